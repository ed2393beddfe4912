"""Faults: kills and resume, cut files, skipped batches, and torchrun's processes when one of them fails or
has less to do. The full count of kills is `python tests/tools/kill_resume.py`."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import rl as rl_module
import torch
import train as module
from eval import find_checkpoint
from kill_resume import ROOT, differences, metrics
from test_train import assert_same, command, weights
from train import Run
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


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
def deadly(owner, name, now):
    real = getattr(owner, name)
    setattr(owner, name, lambda *args: os.kill(os.getpid(), signal.SIGKILL) if now(*args) else real(*args))
deadly(train.Run, "clip_gradients", lambda run, *_: run.step == {gradient})
deadly(train.os, "replace", lambda _, final: final.name == "step-{checkpoint:07d}")
deadly(train, "validate", lambda run, _: run.step == {evaluation})
train.main({args!r})
"""
NEVER = dict(gradient=-1, checkpoint=-1, evaluation=-1)


@pytest.mark.parametrize("stage, step", [("vae", 13), ("rl", 3)])  # of vae: within the stage of latents alone
def test_killed_and_resumed_equals_never_killed(tmp_path, whole, warm, data, stage, step):
    """Every file of every checkpoint and every line of the metrics, bit for bit. The moments are counted in
    steps: before the weights change, in an evaluation, before a checkpoint gets its name."""
    args = stage_args(stage, warm, tmp_path, data)
    for moment in (dict(gradient=step), dict(evaluation=step + 3), dict(checkpoint=step + 5)):
        code = KILLED.format(root=str(ROOT), args=args, **NEVER | moment)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        args = [*args, "--resume"]
    assert [path.name for path in (tmp_path / stage).glob(".tmp-*")] == [f".tmp-step-{step + 5:07d}"]
    train(args)
    assert differences(tmp_path / stage, whole / stage) == []
    rows = metrics(whole / stage)
    assert any(r.get("grad_norm", 0) > 0 for r in rows[:step]) and any("valid" in r for r in rows)


def test_differences_are_seen(tmp_path, whole):
    """What the harness compares with: one byte, one line, one checkpoint."""
    newest = "step-0000024"
    for change in ("metrics.jsonl", f"{newest}/optimizer.safetensors", f"{newest}/decoder/model.safetensors"):
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
    """What a kill or a full disk leaves of a line may end in a brace. A log that is gone begins anew."""
    shutil.copytree(whole / "vae", tmp_path / "vae")
    resume = ["--stage", "vae", "--resume", "--out_dir", str(tmp_path)]
    file = tmp_path / "vae" / "metrics.jsonl"
    with open(file, "a") as f:
        f.write('{"step": 24, "stage": 3, "valid": {"accuracy": 0.5}')
    train(resume)
    assert metrics(tmp_path / "vae") == metrics(whole / "vae")
    file.unlink()
    train(resume)
    assert file.read_text() == ""


@pytest.mark.parametrize("old_run", (False, True))
def test_a_checkpoint_that_is_half_deleted_is_not_seen(tmp_path, data, old_run, monkeypatch):
    """Neither an outdated one of this run, nor those of an earlier run that a new one replaces."""
    def cut_short(folder, **_):
        (folder / "model.safetensors").unlink()
        raise KeyboardInterrupt

    args = command(tmp_path, data, "--max_iters", "4", "--save_every", "1")
    if old_run:
        train(args)
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", cut_short)
        with pytest.raises(KeyboardInterrupt):
            train(args)
    found = list((tmp_path / "vae").glob("step-*"))
    assert found and all((ckpt / "model.safetensors").exists() for ckpt in found)
    train(args)  # tidies up
    found = {path.name for path in (tmp_path / "vae").iterdir()}
    assert found == {"metrics.jsonl", "step-0000003", "step-0000004"}


def test_a_batch_in_which_no_group_varies_is_skipped(tmp_path, warm, data, monkeypatch):
    real = rl_module.compute_rewards
    equal = lambda *args: real(*args) | {"reward": torch.full((16,), 0.7)}
    monkeypatch.setattr(rl_module, "compute_rewards", equal)
    train(command(tmp_path, data, "--max_iters", "3", "--init", str(warm), stage="rl"))
    before, after = weights(warm, "vae"), weights(tmp_path, "rl")
    assert_same({k: v for k, v in before.items() if not k.startswith("optimizer")}, after, exact=True)
    rows = [r for r in metrics(tmp_path / "rl") if "reward" in r]
    assert len(rows) == 3 and not any("grad_norm" in r for r in rows)


# --- torchrun ---

CHILD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
import torch.distributed as dist
import rl
import train
from data import cli
rank = int(os.environ["RANK"])
with open({pids!r}, "a") as f:
    f.write(f"{{os.getpid()}}\\n")
{body}
"""


def torchrun(tmp_path, body, *args):
    """Two processes of a script that may change train.py first. All of them end; the hour is against a hang."""
    script, pids = tmp_path / "child.py", tmp_path / "pids"
    script.write_text(CHILD.format(root=str(ROOT), pids=str(pids), body=body))
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.Popen([*runner, str(script), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    try:
        said, errors = process.communicate(timeout=3600)
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun ends its processes
            process.communicate()
    numbers = pids.read_text().split()
    assert len(numbers) == 2 and not any(Path(f"/proc/{n}").exists() for n in numbers)
    return process.returncode, errors


def the_error(errors):
    """The one line that all processes in trouble print."""
    lines = {line for line in errors.splitlines() if line.startswith("error: ")}
    assert len(lines) == 1 and "[rank" not in errors, errors
    return lines.pop()


FAULT = """
real = train.Run.clip_gradients
def clip_gradients(run, optimizer, clip):
    if run.step == 2 and rank == 1:
        {fault}
    return real(run, optimizer, clip)
train.Run.clip_gradients = clip_gradients
cli(train.main)
"""


def test_an_error_of_one_process_is_said_and_ends_the_other(tmp_path, data):
    status, errors = torchrun(tmp_path, FAULT.format(fault="raise ValueError('a bad row')"),
                              *command(tmp_path, data, "--max_iters", "8", "--save_every", "1"))
    assert status != 0 and "error: a bad row" in errors.splitlines(), errors
    assert find_checkpoint(tmp_path / "vae").name == "step-0000002"


def test_a_signal_to_one_process_ends_all_after_the_same_step(tmp_path, data):
    status, errors = torchrun(tmp_path, FAULT.format(fault="os.kill(os.getpid(), signal.SIGTERM)"),
                              *command(tmp_path, data, "--max_iters", "8"))
    assert status != 0 and "Traceback" not in errors.split("torch/distributed")[0], errors
    assert [p.name for p in (tmp_path / "vae").glob("step-*")] == ["step-0000003"]


def test_a_loss_that_is_not_finite_on_one_process_stops_all_before_the_step(tmp_path, data):
    poison = """
real = train.collate
calls = []
def collate(*args):
    batch = real(*args)
    calls.append(1)
    if len(calls) == 3 and rank == 1:
        batch = batch._replace(target_weight=float("nan"))
    return batch
train.collate = collate
cli(train.main)
"""
    status, errors = torchrun(tmp_path, poison,
                              *command(tmp_path, data, "--max_iters", "8", "--save_every", "1"))
    assert status != 0 and "step 3: the gradient norm is nan" in the_error(errors)
    assert find_checkpoint(tmp_path / "vae").name == "step-0000002"


JOIN = """
dist.init_process_group("gloo")
torch.set_num_threads(1)
"""
LEAVE = """
import gc
gc.collect()  # as main does
dist.destroy_process_group()
"""


def test_fewer_examples_than_processes_and_unlike_shares(tmp_path, warm, data):
    """One example to train on, one to validate with; 3 questions of RL, all groups of one process without
    variance (and no divergence to learn from)."""
    two = tmp_path / "two.txt"
    two.write_text("".join(Path(data).read_text().splitlines(keepends=True)[:2]))
    two = str(two)
    vae = ["--max_iters", "4", "--eval_every", "2", "--batch_size", "5", "--micro_batch", "2"]
    own = ["--max_iters", "2", "--questions_per_step", "3", "--minibatch", "6", "--micro_batch", "2"]
    own += ["--init", str(warm), "--kl_coef", "0"]
    body = JOIN + f"""
train.main({command(tmp_path / "a", two, *vae)!r})
real = rl.compute_rewards
def unlike(*args):
    result = real(*args)
    n = len(result["reward"])
    return result | {{"reward": torch.ones(n) if rank else torch.arange(n) % 2 / 1.0}}
rl.compute_rewards = unlike
train.main({command(tmp_path / "b", data, *own, stage="rl")!r})
""" + LEAVE
    status, errors = torchrun(tmp_path, body)
    assert status == 0, errors
    train(command(tmp_path / "one", two, *vae))
    assert_same(weights(tmp_path / "a", "vae"), weights(tmp_path / "one", "vae"))
    valid = lambda out: [r["valid"] for r in metrics(out / "vae") if "valid" in r]
    assert valid(tmp_path / "a") == [pytest.approx(v) for v in valid(tmp_path / "one")]
    rows = [r for r in metrics(tmp_path / "b" / "rl") if "reward" in r]
    assert len(rows) == 2 and all(r["grad_norm"] > 0 for r in rows)


def test_resume_with_other_numbers_of_processes_and_micro_batches(tmp_path, whole, warm, data, monkeypatch):
    """A run of one process goes on as two: the same global batches, up to rounding."""
    real, later = Run.clip_gradients, []

    def stopped(run, optimizer, clip):
        if run.step == 6:
            raise KeyboardInterrupt
        return real(run, optimizer, clip)

    for stage in ("vae", "rl"):
        args = stage_args(stage, warm, tmp_path, data)
        with monkeypatch.context() as patch:
            patch.setattr(Run, "clip_gradients", stopped)
            with pytest.raises(KeyboardInterrupt):
                train(args)
        assert find_checkpoint(tmp_path / stage).name == "step-0000006"
        later.append([*args, "--resume", "--micro_batch", "3"])
    body = JOIN + "".join(f"train.main({a!r})\n" for a in later) + LEAVE
    status, errors = torchrun(tmp_path, body)
    assert status == 0, errors
    for stage in ("vae", "rl"):
        assert_same(weights(tmp_path, stage), weights(whole, stage))
        assert [r["step"] for r in metrics(tmp_path / stage)] == [r["step"] for r in metrics(whole / stage)]


def test_a_wrong_number_of_processes_keeps_the_earlier_run(tmp_path, warm, data, monkeypatch):
    earlier = tmp_path / "vae" / "step-0000001"
    earlier.mkdir(parents=True)

    class Many(Run):
        def __init__(self, *args):
            super().__init__(*args)
            self.world = 9

    monkeypatch.setattr(module, "Run", Many)
    with pytest.raises(ValueError, match="--batch_size 8 is smaller than the number of processes 9"):
        train(command(tmp_path, data))
    with pytest.raises(ValueError, match="--questions_per_step 4 is smaller"):
        train(command(tmp_path, data, "--init", str(warm), stage="rl"))
    assert earlier.exists()
