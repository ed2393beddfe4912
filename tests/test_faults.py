"""Faults: kills and resume, cut files, skipped batches, and torchrun's processes when one of them fails or has less to
do. The full count of kills is `python tests/faults.py`."""

import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import train as module
from eval import find_checkpoint
from faults import ROOT, differences, killed_run, metrics
from test_train import assert_same, command, weights
from train import main as train

OFTEN = ["--save_every", "1", "--eval_every", "2"]


def stage_args(stage, warm, out, data, *flags):
    own = ["--max_iters", "24"] if stage == "vae" else ["--max_iters", "12", "--init", str(warm)]
    return command(out, data, *own, *OFTEN, *flags, stage=stage)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, warm, data):
    """Both stages, never killed."""
    out = tmp_path_factory.mktemp("whole")
    for stage in ("vae", "rl"):
        train(stage_args(stage, warm, out, data))
    return out


@pytest.mark.parametrize("stage, step", [("vae", 14), ("rl", 4)])  # of vae: within the stage of latents alone
def test_killed_twice_and_resumed_equals_never_killed(tmp_path, whole, warm, data, stage, step):
    """Every file of every checkpoint and every line of the metrics, bit for bit."""
    phases = killed_run(stage_args(stage, warm, tmp_path, data), tmp_path / stage, 2, 2, random.Random(0), 0, [step])
    assert sum(phases.values()) == 2
    assert differences(tmp_path / stage, whole / stage) == []
    rows = metrics(whole / stage)
    assert any(r.get("grad_norm", 0) > 0 for r in rows[:step]) and any("valid" in r for r in rows)


def test_differences_are_seen(tmp_path, whole):
    """What the harness compares with: one byte, one line, one checkpoint."""
    for change in ("metrics.jsonl", "step-0000024/optimizer.safetensors", "step-0000024/decoder/model.safetensors"):
        copy = tmp_path / change.replace("/", "_")
        shutil.copytree(whole / "vae", copy)
        file = copy / change
        raw = file.read_bytes()
        last = raw[raw[:-1].rindex(b"\n") + 1:] if file.suffix == ".jsonl" else b""
        file.write_bytes(raw + last if last else raw[:-1] + bytes([raw[-1] ^ 1]))
        assert [d.split()[0] for d in differences(copy, whole / "vae")] == [change]
    shutil.rmtree(copy / "step-0000023")
    assert "checkpoints" in differences(copy, whole / "vae")[0]


def test_a_line_of_metrics_cut_inside_a_figure(tmp_path, whole, data, warm):
    """What a kill or a full disk leaves of a line may end in a brace."""
    train(stage_args("vae", warm, tmp_path, data))
    with open(tmp_path / "vae" / "metrics.jsonl", "a") as f:
        f.write('{"step": 24, "stage": 3, "valid": {"accuracy": 0.5}')
    train(["--stage", "vae", "--resume", "--out_dir", str(tmp_path)])
    assert metrics(tmp_path / "vae") == metrics(whole / "vae")


def test_a_checkpoint_that_is_half_deleted_is_not_seen(tmp_path, data, monkeypatch):
    def cut_short(folder, **_):
        (folder / "model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", cut_short)
        with pytest.raises(KeyboardInterrupt):
            train(command(tmp_path, data, "--max_iters", "4", "--save_every", "1"))
    found = list((tmp_path / "vae").glob("step-*"))
    assert found and all((ckpt / "model.safetensors").exists() for ckpt in found)


def test_a_batch_in_which_no_group_varies_is_skipped_and_counted(tmp_path, warm, data, monkeypatch):
    real = module.score
    same = lambda *args: replace(real(*args), reward=torch.full((16,), 0.7))
    monkeypatch.setattr(module, "score", same)
    train(command(tmp_path, data, "--max_iters", "3", "--init", str(warm), stage="rl"))
    before, after = weights(warm, "vae"), weights(tmp_path, "rl")
    assert_same({k: v for k, v in before.items() if not k.startswith("optimizer")}, after, exact=True)
    assert json.loads((find_checkpoint(tmp_path / "rl") / "train.json").read_text())["skipped"] == 3
    rows = [r for r in metrics(tmp_path / "rl") if "reward" in r]
    assert [r["skipped"] for r in rows] == [1, 2, 3] and not any("grad_norm" in r for r in rows)


# --- torchrun ---

CHILD = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
import torch.distributed as dist
import train
from eval import run_main
rank = int(os.environ["RANK"])
with open({pids!r}, "a") as f:
    f.write(f"{{os.getpid()}}\\n")
{body}
"""


def torchrun(tmp_path, body, *args, timeout=90):
    """Two processes of a script that may change train.py first. They end in bounded time, and all of them."""
    script, pids = tmp_path / "child.py", tmp_path / "pids"
    script.write_text(CHILD.format(root=str(ROOT), pids=str(pids), body=body))
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), *args]
    process = subprocess.Popen(runner, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said, errors = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun ends its processes
            process.communicate()
    numbers = pids.read_text().split()
    assert len(numbers) == 2 and not any(Path(f"/proc/{n}").exists() for n in numbers)
    return process.returncode, errors


def the_error(errors):
    """The one line that a process printed, which torchrun's last lines repeat."""
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "[rank" not in errors, errors
    assert lines[0] in errors[errors.index("Root Cause"):], errors
    return lines[0]


FAIL = """
real = train.supervised_step
def step(run, ddp, optimizer, examples, stage, step, lr):
    if step == 3 and rank == 1:
        {fault}
    return real(run, ddp, optimizer, examples, stage, step, lr)
train.supervised_step = step
run_main(train.main)
"""


def test_a_process_that_dies_ends_the_other(tmp_path, data):
    status, errors = torchrun(tmp_path, FAIL.format(fault="os.kill(os.getpid(), signal.SIGKILL)"),
                              *command(tmp_path, data, "--max_iters", "8", "--save_every", "1"))
    last = errors[errors.index("Root Cause"):]
    assert status != 0 and "SIGKILL" in last and "rank      : 1" in last and "[rank0]" not in errors, errors
    assert find_checkpoint(tmp_path / "vae").name == "step-0000002"


def test_an_error_of_one_process_is_said_by_it(tmp_path, data):
    status, errors = torchrun(tmp_path, FAIL.format(fault="raise ValueError('a bad row')"),
                              *command(tmp_path, data, "--max_iters", "8"))
    assert status != 0 and the_error(errors) == "error: a bad row"


def test_an_error_of_all_processes_is_said_once(tmp_path, data):
    """A loss that is not finite on one process stops all before the step."""
    poison = """
real = train.collate
calls = []
def collate(*args):
    batch = real(*args)
    calls.append(1)
    if len(calls) == 3 and rank == 1:
        batch.token_weight = float("nan")
    return batch
train.collate = collate
run_main(train.main)
"""
    status, errors = torchrun(tmp_path, poison, *command(tmp_path, data, "--max_iters", "8", "--save_every", "1"))
    assert status != 0 and "step 3: answer is not finite" in the_error(errors)
    assert find_checkpoint(tmp_path / "vae").name == "step-0000002"


def test_a_wrong_flag_is_said_once(tmp_path):
    status, errors = torchrun(tmp_path, "run_main(train.main)", "--lr", "fast")
    assert status != 0 and "--lr" in the_error(errors)


JOIN = """
dist.init_process_group("gloo")
torch.set_num_threads(1)
"""
LEAVE = """
dist.destroy_process_group()
threads = [f.read_text().strip() for f in Path("/proc/self/task").glob("*/comm")]
assert not any("gloo" in name for name in threads), threads  # they could abort the process at its end
"""


def test_fewer_examples_than_processes_and_unlike_shares(tmp_path, warm, data):
    """One example to train on, one to validate with; 3 questions of RL, all groups of one process without variance
    (and no divergence to learn from)."""
    two = tmp_path / "two.txt"
    two.write_text("".join(Path(data).read_text().splitlines(keepends=True)[:2]))
    two = str(two)
    vae = ["--max_iters", "4", "--eval_every", "2", "--batch_size", "5", "--micro_batch", "2"]
    rl = ["--max_iters", "2", "--questions_per_step", "3", "--minibatch", "6", "--micro_batch", "2"]
    rl += ["--init", str(warm), "--kl_coef", "0"]
    body = JOIN + f"""
train.main({command(tmp_path / "a", two, *vae)!r})
real = train.score
def score(model, rollout, *args):
    result = real(model, rollout, *args)
    n = len(result.reward)
    return replace(result, reward=torch.ones(n) if rank else torch.arange(n) % 2 / 1.0)
train.score = score
train.main({command(tmp_path / "b", data, *rl, stage="rl")!r})
""" + LEAVE
    status, errors = torchrun(tmp_path, body)
    assert status == 0, errors
    train(command(tmp_path / "one", two, *vae))
    assert_same(weights(tmp_path / "a", "vae"), weights(tmp_path / "one", "vae"))
    valid = lambda out: [r["valid"] for r in metrics(out / "vae") if "valid" in r]
    assert valid(tmp_path / "a") == [pytest.approx(v) for v in valid(tmp_path / "one")]
    rows = [r for r in metrics(tmp_path / "b" / "rl") if "reward" in r]
    assert [r["skipped"] for r in rows] == [0, 0] and all(r["grad_norm"] > 0 for r in rows)


def test_resume_with_other_numbers_of_processes_and_micro_batches(tmp_path, whole, warm, data, monkeypatch):
    """A run of one process goes on as two: the same global batches, up to rounding."""
    def stopped(name, at):
        real = getattr(module, name)

        def step(*args):
            if args[-2] == at:
                raise KeyboardInterrupt
            return real(*args)
        return step

    later = []
    for stage, name in (("vae", "supervised_step"), ("rl", "rl_step")):
        args = stage_args(stage, warm, tmp_path, data)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, stopped(name, 7))
            with pytest.raises(KeyboardInterrupt):
                train(args)
        later.append([*args, "--resume", "--micro_batch", "3"])
    body = JOIN + "".join(f"train.main({a!r})\n" for a in later) + LEAVE
    status, errors = torchrun(tmp_path, body)
    assert status == 0, errors
    for stage in ("vae", "rl"):
        assert_same(weights(tmp_path, stage), weights(whole, stage))
        assert [r["step"] for r in metrics(tmp_path / stage)] == [r["step"] for r in metrics(whole / stage)]


def test_a_wrong_number_of_processes_keeps_the_earlier_run(tmp_path, warm, data):
    earlier = tmp_path / "vae" / "step-0000001"
    earlier.mkdir(parents=True)
    run = module.Run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Run", lambda *args: setattr(r := run(*args), "world", 9) or r)
        with pytest.raises(ValueError, match="--batch_size 8 leaves a process without rows"):
            train(command(tmp_path, data))
        with pytest.raises(ValueError, match="--questions_per_step 4 is smaller"):
            train(command(tmp_path, data, "--init", str(warm), stage="rl"))
    assert earlier.exists()
