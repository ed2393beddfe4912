"""What only a GPU can show: ATP_GPU=1 python -m pytest tests/test_gpu.py. Without one, the tests that can
compare the CPU with itself, which shows that this file still goes with the code. The others are skipped."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from data import ASSETS, Tokenizer, encode_all, load
from eval import find_checkpoint
from model import LLaMA, LLaMAConfig
from rl import LogProbs
from vae import END, METHODS, START, LatentConfig, LatentReasoner, Noise, collate, to_device

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU (ATP_GPU=1 leaves it visible)")
ROOT = Path(__file__).resolve().parent.parent
GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
K, C, D = 4, 2, 64
SMALL = ("--hidden_size 64 --layers 2 --heads 4 --intermediate_size 128 --batch_size 16 --micro_batch 8 "
         "--annotated 200 --eval_size 16 --log_every 1 --lr 1e-4 --cot_lr 1e-4 --stage vae "
         f"--device {GPU.type} --dtype float32 --compile no").split()


@pytest.fixture(autouse=True)
def exact():
    """fp32 is fp32: no TF32."""
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")  # a Run may have changed it


@pytest.fixture(scope="module")
def small():
    """(model on the CPU, examples of 1 to 4 and more steps). Its vocabulary is no multiple of 64."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_pretrained(ASSETS)
    tokenizer.add_special(START, END)
    policy = LLaMA(LLaMAConfig(tokenizer.vocab_size, D, 128, 2, 4, 2, 16, eos_token_id=tokenizer.eos_id))
    assert policy.config.vocab_size % 64
    config = LatentConfig(**METHODS["atp"], method="atp", thoughts_per_step=C, max_steps=K,
                          start_id=tokenizer.special[START], end_id=tokenizer.special[END],
                          eos_id=tokenizer.end_id(), vocab_size=tokenizer.vocab_size)
    examples, _ = encode_all(load("builtin", "train")[:24], tokenizer, 256)
    return LatentReasoner(policy, config), examples


def batch_of(small, rows, stage=K):
    model, examples = small
    noise = torch.randn(rows, K, C, D, generator=torch.Generator().manual_seed(1))
    return collate(examples[:rows], model.config, stage, noise)


def losses_and_gradients(model, batch, bf16=False):
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        losses = model(to_device(batch, model.device))
    sum(losses.values()).backward()
    gradients = {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {k: float(v.detach()) for k, v in losses.items()}, gradients


def assert_same(found, wanted):
    """Losses to 1e-5 of their size, gradients to 1e-4 of theirs."""
    (losses, gradients), (wanted_losses, wanted_gradients) = found, wanted
    assert losses == pytest.approx(wanted_losses, rel=1e-5)
    assert gradients.keys() == wanted_gradients.keys()
    for name, g in wanted_gradients.items():
        assert (gradients[name] - g).norm() <= 1e-4 * g.norm() + 1e-7, name


def rollout_of(small, model, group=1, noise=None):
    return model.eval().rollout([e.question for e in small[1][:8]], group, noise)


def assert_same_rollout(found, wanted):
    for name in ("tokens", "lengths"):
        assert torch.equal(getattr(found, name).cpu(), getattr(wanted, name).cpu()), name
    for name in ("steps", "stopped"):
        assert torch.equal(getattr(found.plan, name).cpu(), getattr(wanted.plan, name).cpu()), name
    assert torch.allclose(found.plan.z.cpu(), wanted.plan.z.cpu(), atol=1e-4)


def test_fp32_equals_the_cpu(small):
    model, batch = small[0], batch_of(small, 8)
    on_gpu = copy.deepcopy(model).to(GPU)
    assert_same(losses_and_gradients(on_gpu, batch), losses_and_gradients(model, batch))
    assert_same_rollout(rollout_of(small, on_gpu), rollout_of(small, model))


@pytest.mark.parametrize("grad", ["score", "path"])
def test_log_probabilities_equal_the_cpu(small, grad):
    model = small[0]
    noise = Noise.draw(32, model.config, D, 16, torch.Generator().manual_seed(2))
    rollout = rollout_of(small, model, 4, noise)
    on_gpu = copy.deepcopy(model).to(GPU)
    found = LogProbs(on_gpu, latent_grad=grad)(to_device(rollout, GPU))
    wanted = LogProbs(model, latent_grad=grad)(rollout)
    for name, value in wanted._asdict().items():
        if value is not None:
            assert torch.allclose(getattr(found, name).cpu(), value, rtol=1e-4, atol=1e-4), name


def test_bf16_is_within_rounding(small):
    on_gpu, batch = copy.deepcopy(small[0]).to(GPU), batch_of(small, 8)
    losses, gradients = losses_and_gradients(on_gpu, batch)
    rounded, rounded_gradients = losses_and_gradients(on_gpu, batch, bf16=True)
    assert rounded == pytest.approx(losses, rel=5e-2)
    assert rounded != losses  # autocast was on
    one, other = (torch.cat([g[n].flatten() for n in gradients]) for g in (gradients, rounded_gradients))
    assert torch.cosine_similarity(one, other, dim=0) > 0.99


@needs_gpu
@pytest.mark.parametrize("repeat", [False, True])
def test_compiled_equals_eager_and_compiles_once(small, repeat):
    torch._dynamo.reset()
    eager, compiled = (copy.deepcopy(small[0]).to(GPU) for _ in range(2))
    for llama in compiled.llamas():
        llama.compile_blocks()
        llama.activation_checkpointing = repeat
    graphs = []
    for rows in (8, 13):
        batch = batch_of(small, rows)
        assert_same(losses_and_gradients(compiled, batch), losses_and_gradients(eager, batch))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[1] == graphs[0]  # other sizes, the same graphs
    if not repeat:
        assert_same_rollout(rollout_of(small, compiled), rollout_of(small, eager))


@needs_gpu
@pytest.mark.parametrize("repeat", [False, True])
def test_the_forward_pass_never_waits_for_the_gpu(small, repeat):
    on_gpu = copy.deepcopy(small[0]).to(GPU)
    text, latent = (to_device(batch_of(small, 8, stage), GPU) for stage in (0, K))
    for llama in on_gpu.llamas():
        llama.activation_checkpointing = repeat
    on_gpu(latent)  # tables are moved to the GPU once
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = on_gpu(text) | on_gpu(latent)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(losses) == 4
    with pytest.raises(RuntimeError, match="synchronizing"):  # the mode tells
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses["answer"].item()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# --- train.py ---

def metrics(folder):
    lines = [json.loads(line) for line in (Path(folder) / "vae" / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "grad_norm" in line}


def weights(folder):
    ckpt = find_checkpoint(Path(folder) / "vae")
    return {f"{file.name}:{file.parent.name}:{k}".replace(ckpt.name, ""): v
            for file in sorted(ckpt.rglob("*.safetensors")) for k, v in load_file(file).items()}


def test_resume_equals_no_stop(tmp_path, data, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        flags = [*SMALL, "--data", data, "--max_iters", "12"]
        train.main([*flags, "--out_dir", str(tmp_path / "whole")])
        with monkeypatch.context() as m, pytest.raises(SystemExit):
            m.setattr(train.Run, "asked_to_stop", lambda self: self.step == 7)
            train.main([*flags, "--out_dir", str(tmp_path / "cut")])
        assert max(metrics(tmp_path / "cut")) == 7
        train.main([*flags, "--out_dir", str(tmp_path / "cut"), "--resume"])
    finally:
        torch.use_deterministic_algorithms(False)
    whole, cut = metrics(tmp_path / "whole"), metrics(tmp_path / "cut")
    assert whole.keys() == cut.keys() and max(whole) == 12
    for step, line in whole.items():
        assert cut[step]["answer"] == pytest.approx(line["answer"], rel=1e-5)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert one.keys() == other.keys() and any("optimizer" in name for name in one)
    for name, w in one.items():
        assert torch.allclose(other[name], w, atol=1e-5), name


DDP_OF_ONE = """
import sys
sys.path.insert(0, {root!r})
import torch.distributed as dist
import train

def wrap(run, module):  # one process alone would do without
    print("backend", dist.get_backend())
    return train.DDP(module, gradient_as_bucket_view=True)

train.Run.wrap = wrap
train.main(sys.argv[1:])
"""


@needs_gpu
def test_torchrun_with_nccl_equals_no_torchrun(tmp_path):
    flags, script = [*SMALL, "--max_iters", "4"], tmp_path / "script.py"
    script.write_text(DDP_OF_ONE.format(root=str(ROOT)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1",
               str(script), *flags, "--out_dir", str(tmp_path / "many")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "backend nccl" in done.stdout
    train.main([*flags, "--out_dir", str(tmp_path / "one")])
    one, many = metrics(tmp_path / "one"), metrics(tmp_path / "many")
    assert one.keys() == many.keys()
    for step, line in one.items():
        assert many[step]["answer"] == pytest.approx(line["answer"], rel=1e-4)
