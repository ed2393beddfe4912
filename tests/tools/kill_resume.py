"""Kill training again and again, resume it, and compare with the run that was never killed, bit for bit.

    python tests/tools/kill_resume.py                       20 kills a stage, then as other numbers of
                                                            processes, then 2,000 steps of memory
    python tests/tools/kill_resume.py --kills 3 --soak 0    a quick look

The runs are real processes on the CPU, with the built-in task and the default model. SIGKILL comes at random
moments, while a checkpoint is written, and in evaluation. Every file of every checkpoint that is kept
(parameters, optimizer state, settings) and every line of metrics.jsonl must be equal, but for clocks and
memory. The exit status is 1 if one is not.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
CLOCKS = {"seconds", "memory_gb", "rollout_s", "score_s", "update_s"}
STEPS = {"vae": ["--max_iters", "24", "--save_every", "4", "--eval_every", "6"],
         # few rollouts: one of many has a uniform number within rounding of a border, and takes another token
         "rl": ["--max_iters", "12", "--save_every", "2", "--eval_every", "3",
                "--questions_per_step", "8", "--minibatch", "64"]}
# long enough that some answers are well formed: RL skips batches in which all rewards are equal
WARM = ["--max_iters", "60", "--warmup", "10", "--eval_every", "0"]
COMMON = ["--eval_size", "16", "--log_every", "1", "--threads", "1"]
SMALL = ["--hidden_size", "32", "--layers", "2", "--heads", "2", "--intermediate_size", "48",
         "--max_steps", "3", "--batch_size", "8", "--questions_per_step", "4", "--group", "4",
         "--minibatch", "16", "--eval_size", "16", "--eval_every", "250", "--save_every", "250",
         "--log_every", "10", "--threads", "1"]


def start(*args, processes=1):
    """A training process (torchrun's, if there are several), silent but for its errors."""
    runner = []
    if processes > 1:
        runner = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen([sys.executable, *runner, str(ROOT / "train.py"), *map(str, args)], text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})


def finish(process):
    """Wait for the end of a run that must succeed. Its number of steps ends it, not a clock."""
    _, said = process.communicate()
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}: {said.strip()}")


# --- comparing ---

def metrics(folder):
    """The whole lines of metrics.jsonl, without clocks."""
    try:
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows]


def contents(ckpt):
    """{file: bytes} of a checkpoint, train.json parsed and without what a resumed run has otherwise."""
    files = {str(f.relative_to(ckpt)): f.read_bytes() for f in sorted(ckpt.rglob("*")) if f.is_file()}
    state = json.loads(files["train.json"])
    for name in ("resume", "out_dir"):
        state["config"].pop(name)
    state.pop("logged")  # the clocks of metrics.jsonl have more or fewer digits
    state.pop("saved")  # when
    return {**files, "train.json": state}


def differences(got, want):
    """What is not the same in two run folders, as lines of text: none, if all is."""
    names = [sorted(p.name for p in Path(f).glob("step-*")) for f in (got, want)]
    if names[0] != names[1]:
        return [f"checkpoints: {names[0]}, not {names[1]}"]
    found = []
    for name in names[0]:
        a, b = contents(Path(got) / name), contents(Path(want) / name)
        found += [f"{name}/{file}" for file in sorted(a.keys() | b.keys()) if a.get(file) != b.get(file)]
    a, b = metrics(got), metrics(want)
    if a != b:
        at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        found.append(f"metrics.jsonl line {at + 1}: {a[at:at + 1]}, not {b[at:at + 1]} "
                     f"({len(a)} and {len(b)} lines)")
    return found


def idle(folder):
    """A run in which no step changes the weights proves nothing: a line of text, if `folder` has one."""
    learns = any(row.get("grad_norm", 0) > 0 for row in metrics(folder))
    return [] if learns else [f"{folder}: no step of this run has changed the weights"]


# --- killing ---

def last_row(folder):
    """The last line of metrics.jsonl, {} without one."""
    return (metrics(folder) or [{}])[-1]


def in_evaluation(folder, every):
    row = last_row(folder)
    if row.get("stage") == 0:  # text: there is nothing to validate yet
        return False
    return row.get("step", 0) > 0 and row["step"] % every == 0 and "valid" not in row


def training(folder, since):
    """Whether a run that began at `since` has got to its steps: it writes metrics.jsonl, anew if resumed."""
    try:
        return (Path(folder) / "metrics.jsonl").stat().st_mtime >= since
    except FileNotFoundError:
        return False


def temporary(folder, since):
    """Names of unfinished or half deleted checkpoints that were begun after `since`."""
    found = []
    for path in Path(folder).glob(".tmp-*"):
        try:
            found += [path.name] if path.stat().st_mtime >= since else []
        except FileNotFoundError:  # renamed meanwhile
            pass
    return found


def kill_at(process, folder, aim, after, every):
    """SIGKILL to a running process `after` seconds from its start (aim "any"), or from the moment when it
    trains, writes a checkpoint, evaluates, or has logged step `aim`. Returns the phase in which it was hit,
    as what it left shows; None if it had ended by itself."""
    began = time.time()
    aims = {"any": lambda: True,
            "step": lambda: training(folder, began),
            "checkpoint": lambda: temporary(folder, began),
            "evaluation": lambda: in_evaluation(folder, every)}
    hit = aims.get(aim, lambda: training(folder, began) and last_row(folder).get("step", 0) >= aim)
    while process.poll() is None and not hit():
        time.sleep(0.0005)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        pass
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    _, said = process.communicate()
    if process.returncode != -signal.SIGKILL:
        if process.returncode:
            raise RuntimeError(f"exit status {process.returncode}: {said.strip()}")
        return None
    left = temporary(folder, began)
    if any(name.startswith(".tmp-step-") for name in left):
        return "deleting a checkpoint"
    if left:
        return "writing a checkpoint"
    if in_evaluation(folder, every):
        return "evaluation"
    return "step" if training(folder, began) else "start-up"


def killed_run(args, folder, every, kills, rng, seconds, aims=("any", "step", "checkpoint", "evaluation")):
    """Start `args`, kill it, resume it, until there were so many kills or it ended. {phase: kills}"""
    phases, flags = Counter(), []
    while sum(phases.values()) < kills:
        aim = rng.choice(aims)
        latest = {"any": seconds, "step": seconds / 4, "checkpoint": 0.03, "evaluation": 0.1}.get(aim, 0)
        after = rng.uniform(0, latest)
        phase = kill_at(start(*args, *flags), folder, aim, after, every)
        if phase is None:
            return phases
        phases[phase] += 1
        flags = ["--resume"]
    finish(start(*args, *flags))
    return phases


def kill_stage(stage, args, out, whole, kills, seed, seconds):
    """At least so many kills of a stage, over as many runs as it takes, each compared with `whole`."""
    rng, phases, runs, wrong = random.Random(f"{seed} {stage}"), Counter(), 0, idle(whole)
    every = int(STEPS[stage][STEPS[stage].index("--eval_every") + 1])
    while sum(phases.values()) < kills:
        folder = out / f"killed{runs}"
        left = kills - sum(phases.values())
        phases += killed_run([*args, "--out_dir", folder], folder / stage, every, left, rng, seconds)
        wrong += [f"run {runs + 1}: {d}" for d in differences(folder / stage, whole)]
        runs += 1
    where = ", ".join(f"{n} in {phase}" for phase, n in sorted(phases.items()))
    return verdict(f"{stage}: {sum(phases.values())} kills ({where}) over {runs} runs, each compared with "
                   "the one never killed", wrong)


def verdict(text, wrong):
    print(f"{'FAIL' if wrong else 'PASS'} {text}", *wrong, sep="\n  ", flush=True)
    return not wrong


# --- another number of processes, memory ---

def other_shape(stage, args, out, whole):
    """Killed as one process, resumed as two with another --micro_batch: the same run, up to rounding."""
    from safetensors.torch import load_file
    folder = out / "reshaped"
    phase = kill_at(start(*args, "--out_dir", folder), folder / stage, "evaluation", 0.0, 6)  # half-way
    finish(start(*args, "--out_dir", folder, "--resume", "--micro_batch", 5, processes=2))
    wrong = [] if phase else ["it ended before it was killed"]
    a, b = (max(f.glob("step-*")) for f in (folder / stage, whole))
    largest = 0.0
    for file in sorted(b.rglob("*.safetensors")):
        x, y = load_file(a / file.relative_to(b)), load_file(file)
        for k in y:
            worst = float((x[k] - y[k]).abs().max() / y[k].abs().max().clamp(min=1e-12))
            largest = max(largest, worst)
            if worst > 0.01:
                wrong.append(f"{file.relative_to(b)} {k}: off by {worst:.2g} of its largest number")
    x, y = metrics(folder / stage), metrics(whole)
    if [(r["step"], "valid" in r) for r in x] != [(r["step"], "valid" in r) for r in y]:
        wrong.append("metrics.jsonl: other steps")
    return verdict(f"{stage}: killed as one process, resumed as two with --micro_batch 5: tensors differ by "
                   f"at most {largest:.1g} of their largest number", wrong)


def resident(pid):
    """MB of memory that a process holds now."""
    with open(f"/proc/{pid}/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def soak(stage, args, folder, steps):
    """Memory held over many steps: the last fifth against the second fifth."""
    process, seen = start(*args, "--max_iters", steps, "--out_dir", folder), []
    while process.poll() is None:
        time.sleep(0.1)
        try:
            seen.append((last_row(folder / stage).get("step", 0), resident(process.pid)))
        except (FileNotFoundError, IndexError, ValueError):  # it has just ended
            pass
    finish(process)
    share = lambda a, b: [mb for step, mb in seen if a * steps <= step < b * steps]
    early, late = median(share(0.2, 0.4)), median(share(0.8, 1.0))
    bound = 0.03 * early + 10
    text = (f"{stage}: {steps} steps, {early:.1f} MB held early, {late:.1f} MB late ({late - early:+.1f}; "
            f"bound {bound:+.1f})")
    return verdict(text, idle(folder / stage) + ([] if late - early <= bound else ["memory grows"]))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=20, help="at least so many a stage (20; 0: none)")
    p.add_argument("--soak", type=int, default=2000, help="steps of each stage to watch memory over (2000)")
    p.add_argument("--stages", nargs="+", default=["vae", "rl"], choices=("vae", "rl"))
    p.add_argument("--seed", type=int, default=0, help="of the moments of the kills (0)")
    args = p.parse_args()
    good = []
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        flags = {s: ["--stage", s, *STEPS[s], *COMMON] for s in ("vae", "rl")}
        flags["rl"] += ["--init", tmp / "start" / "vae"]
        for stage in args.stages if args.kills else ():
            if stage == "rl":
                finish(start("--stage", "vae", *COMMON, *WARM, "--out_dir", tmp / "start"))
            began = time.time()
            finish(start(*flags[stage], "--out_dir", tmp / "whole"))
            seconds, whole, out = time.time() - began, tmp / "whole" / stage, tmp / stage
            good.append(kill_stage(stage, flags[stage], out, whole, args.kills, args.seed, seconds))
            good.append(other_shape(stage, flags[stage], out, whole))
        if args.soak:
            curriculum = ["--cot_epochs", "0.1", "--epochs_per_stage", "0.01", "--final_epochs", "1"]
            warm = ["--max_iters", 200, "--lr", 5e-3, "--cot_lr", 5e-3, "--warmup", 10]
            finish(start("--stage", "vae", *SMALL, *warm, "--out_dir", tmp / "soak_start"))
            for stage in args.stages:
                own = ["--init", tmp / "soak_start" / "vae", "--rl_iters", args.soak]
                own = curriculum if stage == "vae" else own
                good.append(soak(stage, ["--stage", stage, *SMALL, *own], tmp / "soak", args.soak))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
