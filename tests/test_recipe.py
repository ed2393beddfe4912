"""The paper's recipe: its settings, and the whole road of a pretrained LLaMA on a CPU.

The road is walked with random weights in Hugging Face's layout, and with SmolLM2-135M if SMOLLM2_DIR names
it."""

import json
import os
import shutil
from pathlib import Path

import eval
import pytest
import rl
import torch
import train
from data import load
from eval import find_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from vae import METHODS

GSM8K = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k_train.jsonl"
SMOLLM2 = Path(os.environ.get("SMOLLM2_DIR", "absent"))
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]  # ids 256, 257 and 258

# The released code's values (paper, sections 4 and 5); the batch size of SFT is ours
SFT = dict(data="gsm8k_aug", annotated=0, thoughts_per_step=2, max_steps=10, cot_epochs=0, epochs_per_stage=2,
           batch_size=256, lr=1e-4, min_lr=1, warmup=0, weight_decay=0.01, decay_all=True, beta2=0.999,
           grad_clip=0, beta_kl=1e-3, decode_coef=1, vae="auto", stop="auto", decode="auto")
RL = dict(latent_grad="score", rl_lr=1e-6, rl_min_lr=1, rl_warmup=0, rl_grad_clip=1, rl_iters=0,
          questions_per_step=16, group=8, minibatch=16, ratio_clip=0.2, std_norm=True, latent_coef=1,
          latent_mean=False, kl_coef=0, w_acc=1, w_fmt=0.5, w_coh=0.1,
          max_answer=16)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder as transformers and tokenizers write it: a byte-level tokenizer, more rows than ids, and <eos>
    as Llama-3.2-1B-Instruct has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM
    folder = tmp_path_factory.mktemp("llama")
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=256, eos_token_id=[257, 258],
        tie_word_embeddings=False)).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    stated = {"bos_token": SPECIAL[0], "eos_token": {"content": SPECIAL[2]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    return folder


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M with all its layers, and with the first 6 of 30, which is quicker."""
    folder = tmp_path_factory.mktemp("smollm2")
    config = json.loads((SMOLLM2 / "config.json").read_text())
    for file in SMOLLM2.glob("tokenizer*.json"):
        shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 6}))
    kept = {n: t for n, t in load_file(SMOLLM2 / "model.safetensors").items()
            if "layers" not in n or int(n.split(".")[2]) < 6}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    yield {30: SMOLLM2, 6: folder}
    shutil.rmtree(folder)


@pytest.fixture
def out(tmp_path):
    yield tmp_path / "out"
    shutil.rmtree(tmp_path / "out", ignore_errors=True)  # of SmolLM2 gigabytes


@pytest.fixture
def precision():
    """Whatever a test sets for fp32 products does not outlive it."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


# --- settings ---

def test_a_pretrained_llama_gets_the_released_recipe(llama):
    cfg = train.resolve({"init": str(llama)})
    for name, value in {**SFT, **RL}.items():
        assert getattr(cfg, name) == value, name
    assert train.PRESETS["pretrained"].items() <= vars(cfg).items()
    # 25 epochs: two for each of ten stages, then five more
    stages = train.curriculum(cfg, True, 256 * 100)
    assert [stage for stage, _, _ in stages] == list(range(1, 12))
    assert [end - start for _, start, end in stages] == [200] * 10 + [500]
    # each is a setting, and nothing of the recipe holds for a model from nothing
    assert train.resolve({"init": str(llama), "lr": 1e-5, "grad_clip": 1.0}).lr == 1e-5
    assert train.resolve({}) == train.Config()


@pytest.mark.parametrize("method, steps", [("atp", 10), ("simcot", 3), ("coconut", 3)])
def test_baselines_get_three_steps(llama, method, steps):
    assert train.resolve({"init": str(llama), "method": method}).max_steps == steps
    assert train.resolve({"init": str(llama), "method": method, "max_steps": 7}).max_steps == 7
    assert train.resolve({"method": method}).max_steps == 6  # a small model from nothing


@pytest.mark.parametrize("name, latent_grad, dtype, bf16, products", [
    ("rl", "score", "auto", False, "highest"), ("rl", "score", "bfloat16", True, "high"),
    ("rl", "score", "float32", False, "highest"), ("rl", "path", "auto", True, "high"),
    ("vae", "score", "auto", True, "high")])
def test_rl_with_score_is_exact_unless_a_dtype_is_named(
        monkeypatch, precision, llama, name, latent_grad, dtype, bf16, products):
    """As a GPU would have it: fp32, with TF32 off."""
    monkeypatch.setattr(train, "device_of", lambda name: torch.device("cuda"))
    torch.set_float32_matmul_precision("medium")  # so that the run must set it
    cfg = train.resolve({"init": str(llama), "latent_grad": latent_grad, "dtype": dtype})
    assert train.Run(cfg, name).bf16 == bf16
    assert torch.get_float32_matmul_precision() == products


def test_the_latent_head_starts_with_a_sigma_of_one(llama):
    cfg = train.resolve({"init": str(llama), "device": "cpu"})
    model, _ = train.build(cfg, train.Run(cfg, "vae"))
    with torch.no_grad():
        mu, logvar = model.latent_head(torch.randn(1000, 32))
    assert 0.4 < float(mu.square().mean().sqrt()) < 0.8
    assert 0.8 < float((logvar / 2).exp().mean()) < 1.25


# --- the road: SFT, RL, evaluation ---

def norm(folder):
    """The final norm's weights of a LLaMA on disk."""
    with safe_open(folder / "model.safetensors", "pt") as f:
        return f.get_tensor("model.norm.weight").float()


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def walk(init, data, out, method):
    """One SFT step, one batch of RL and an evaluation, from the command lines. Returns what eval.py wrote."""
    data, common = ["--data", str(data)], ["--device", "cpu"]
    steps = ["--out_dir", str(out), "--max_iters", "1", "--eval_size", "2", "--log_every", "1", *common]
    steps += ["--method", method]
    train.main(["--stage", "vae", "--init", str(init), "--max_steps", "2",
                "--batch_size", "2", "--dtype", "float32", *data, *steps])
    train.main(["--stage", "rl", "--questions_per_step", "2", "--group", "2", "--minibatch", "2",
                "--max_answer", "4", *steps])
    eval.main(["--ckpt", str(out / train.run_name("rl", method)), "--limit", "2", "--max_tokens", "8", "--explain", "1",
               "--json", str(out / "x.json"), *data, *common])
    return json.loads((out / "x.json").read_text())


@pytest.fixture
def graded(monkeypatch, precision):
    """An untrained model has no right answer to learn from: every other rollout is rewarded."""
    graded = rl.compute_rewards

    def by_turns(*args):
        result = graded(*args)
        return result | {"reward": (torch.arange(len(result["reward"])) % 2).float()}

    monkeypatch.setattr(rl, "compute_rewards", by_turns)


def check_road(init, data, out, method, capsys):
    result = walk(init, data, out, method)
    config, figures = result["config"], result["benchmarks"][str(data)]
    assert config["method"] == method and figures["n"] == 2
    assert {"accuracy", "tokens", "coherence"} <= figures.keys()
    fixed = {"simcot": 4, "coconut": 4, "cot": 0, "nocot": 0}
    assert figures["latents"] == fixed[method] if method in fixed else 0 <= figures["latents"] <= 4
    assert "reference:" in capsys.readouterr().out
    # RL went on with SFT's settings and the recipe's own
    saved = {k: v for k, v in config.items() if k in RL}
    assert saved == {**RL, "questions_per_step": 2, "group": 2, "minibatch": 2, "max_answer": 4}
    assert config["dtype"] == "auto"  # that of SFT was SFT's own
    # AdamW's first step of SFT: lr (sign of the gradient + decay x weight), on a norm too, without warm-up
    names = [train.run_name(kind, method) for kind in ("vae", "rl")]
    ckpt, trained = (find_checkpoint(out / name) for name in names)
    start, sft, end = norm(init), norm(ckpt), norm(trained)
    moved = (start - sft) / 1e-4 - 0.01 * start
    torch.testing.assert_close(moved.abs(), torch.ones_like(moved), atol=5e-3, rtol=0)
    # the two of RL have lr 1e-6
    assert 0 < float((end - sft).abs().max()) < 2.5e-6
    [sft_line], [rl_line] = ([line for line in lines(out / name) if "lr" in line] for name in names)
    assert (sft_line["lr"], rl_line["lr"]) == (1e-4, 1e-6)
    parts = {"atp": {"answer", "decode", "stop", "kl"}, "simcot": {"answer", "decode"}}
    assert parts.get(method, {"answer"}) == sft_line.keys() & parts["atp"]
    assert ("latent_clip_frac" in rl_line) == (method == "atp") and 0 <= rl_line["token_clip_frac"] <= 1
    if METHODS[method]["decode"]:
        assert norm(trained / "decoder").equal(norm(ckpt / "decoder"))


@pytest.mark.parametrize("method", METHODS)
def test_the_road_with_random_weights(tmp_path, out, llama, method, graded, capsys):
    data = tmp_path / "questions.jsonl"
    with open(data, "w") as f:
        for e in load("easy", "test")[:10]:
            answer = f"{' '.join(e.steps)}\n#### {e.answer}"
            f.write(json.dumps({"question": e.question, "answer": answer}) + "\n")
    check_road(llama, data, out, method, capsys)
    ckpt = find_checkpoint(out / train.run_name("rl", method))
    latent, config = (json.loads((ckpt / name).read_text()) for name in ("latent.json", "config.json"))
    # tokenizer_config.json names the end; the new tokens took rows that the tokenizer has no ids for
    ids = {name: latent[name] for name in ("eos_id", "start_id", "end_id", "vocab_size")}
    assert ids == dict(eos_id=258, start_id=259, end_id=260, vocab_size=261)
    assert (config["vocab_size"], config["eos_token_id"]) == (320, [257, 258])


@pytest.mark.skipif(not (SMOLLM2 / "config.json").is_file(), reason="SMOLLM2_DIR names no SmolLM2-135M")
@pytest.mark.skipif(not GSM8K.is_file(), reason="the published GSM8K is not here")
@pytest.mark.parametrize("method, layers", [("atp", 30), ("simcot", 6), ("coconut", 6), ("cot", 6),
                                            ("nocot", 6)])
def test_the_road_with_smollm2(tmp_path, out, smollm2, method, layers, graded, monkeypatch, capsys):
    with open(GSM8K) as f:
        questions = sorted((next(f) for _ in range(300)), key=len)[:10]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(questions))
    # to save time: validation is what eval.py does at the end, and AdamW's state is not read again
    monkeypatch.setattr(train, "validate", lambda *args: False)
    monkeypatch.setattr(train, "save_tensors", lambda *args: None)
    check_road(smollm2[layers], data, out, method, capsys)
