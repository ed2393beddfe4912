"""Training and evaluation from the command line: processes, accumulation, resume, settings, user errors."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import eval
import pytest
import rl as rl_module
import torch
import train as module
import vae as vae_module
from data import Tokenizer, cli, encode_all, load
from eval import evaluate as figures_of
from eval import find_checkpoint
from eval import main as evaluate
from kill_resume import ROOT, differences, finish, metrics, start
from safetensors.torch import load_file, save_file
from train import (FIELDS, NOT_INHERITED, PRESETS, RESUMABLE, Config, Run, batch_indices, build, curriculum,
                   make_optimizer, parse, read_data, report, resolve)
from train import main as train
from vae import END, METHODS, START, LatentConfig, LatentReasoner

SMALL = ["--hidden_size", "16", "--layers", "1", "--heads", "2", "--intermediate_size", "24",
         "--batch_size", "8", "--micro_batch", "8", "--max_steps", "3", "--eval_every", "0",
         "--eval_size", "4", "--log_every", "1", "--threads", "1", "--warmup", "2",
         "--questions_per_step", "4", "--group", "4", "--minibatch", "8", "--rl_lr", "1e-3",
         "--rl_warmup", "1", "--kl_coef", "0.05"]


def command(out, data, *flags, stage="vae"):
    return [*SMALL, "--stage", stage, "--out_dir", str(out), "--data", data, *flags]


def stage_flags(stage, warm):
    """What the fixtures `vae` and `rl` were trained with."""
    return ["--max_iters", "8"] if stage == "vae" else ["--max_iters", "3", "--init", str(warm)]


def weights(out, stage):
    ckpt = find_checkpoint(Path(out) / stage)
    files = sorted(ckpt.rglob("*.safetensors"))
    assert len(files) == 4  # policy, decoder, heads, optimizer
    return {f"{f.relative_to(ckpt)}:{k}": v for f in files for k, v in load_file(f).items()}


def assert_same(a, b, exact=False):
    assert a.keys() == b.keys()
    tolerance = dict(atol=0, rtol=0) if exact else dict(atol=2e-5, rtol=1e-3)
    for k in a:
        torch.testing.assert_close(a[k], b[k], msg=lambda m: f"{k}: {m}", **tolerance)


def figures(row):
    """The numbers of a line of metrics.jsonl."""
    return {k: v for k, v in {**row, **row.get("valid", {})}.items() if k not in ("valid", "stage")}


def assert_logged_the_same(a, b, stage):
    a, b = metrics(Path(a) / stage), metrics(Path(b) / stage)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b):
        assert figures(x) == pytest.approx(figures(y), rel=1e-3, abs=1e-4)


# --- one run in any form is the same run ---

def test_rl_moves_all_but_the_decoder(warm, rl):
    before, after = weights(warm, "vae"), weights(rl, "rl")
    changed = {k for k in before if not k.startswith("optimizer") and not before[k].equal(after[k])}
    parts = {k.split(":")[0] if "heads" not in k else k.split(":")[1].split(".")[0] for k in changed}
    assert parts == {"model.safetensors", "latent_head", "stop_head"}


@pytest.mark.parametrize("stage", ("vae", "rl"))
def test_two_processes_equal_one(tmp_path, vae, warm, rl, data, stage):
    """Same global batch, same rollouts: the same parameters and optimizer state after several steps."""
    finish(start(*command(tmp_path, data, *stage_flags(stage, warm), stage=stage), processes=2))
    assert_same(weights(tmp_path, stage), weights(vae if stage == "vae" else rl, stage))
    assert_logged_the_same(tmp_path, vae if stage == "vae" else rl, stage)


@pytest.mark.parametrize("stage", ("vae", "rl"))
def test_accumulation_changes_nothing(tmp_path, vae, warm, rl, data, stage):
    train(command(tmp_path, data, *stage_flags(stage, warm), "--micro_batch", "3", stage=stage))
    assert_same(weights(tmp_path, stage), weights(vae if stage == "vae" else rl, stage))
    assert_logged_the_same(tmp_path, vae if stage == "vae" else rl, stage)


def test_same_seed_same_weights_other_seed_other_weights(tmp_path, vae, data):
    train(command(tmp_path / "a", data, "--max_iters", "8"))
    assert differences(tmp_path / "a" / "vae", vae / "vae") == []  # all files, and the metrics but for clocks
    train(command(tmp_path / "b", data, "--max_iters", "8", "--seed", "1"))
    name = "model.safetensors:model.norm.weight"
    assert not weights(tmp_path / "b", "vae")[name].equal(weights(vae, "vae")[name])


# --- data and start of a run ---

@pytest.mark.parametrize("method, stage, annotated, count", [
    ("atp", "vae", 0, 38), ("atp", "vae", 10, 10), ("cot", "cot", 0, 38), ("simcot", "vae", 0, 38),
    ("nocot", "nocot", 10, 57), ("atp", "rl", 10, 57)])
def test_only_imitation_needs_steps(tmp_path, data, method, stage, annotated, count):
    """60 questions, the last 3 for validation; every third shows no steps."""
    lines = Path(data).read_text().splitlines()
    for i in range(0, len(lines), 3):
        lines[i] = f"{lines[i].split('||')[0]}|| ####{lines[i].split('####')[1]}"
    file = tmp_path / "questions.txt"
    file.write_text("\n".join(lines))
    run = Run(Config(data=str(file), method=method, annotated=annotated), stage)
    run.model, run.tokenizer = build(run.cfg, Run(run.cfg, "vae"))
    assert len(read_data(run, "train")) == count
    assert len(read_data(run, "valid")) == 3


@pytest.mark.parametrize("method", METHODS)
def test_methods_train_and_evaluate(tmp_path, data, method, capsys):
    """Each in a folder of its own. --stage cot is CoT under another name."""
    stage = "cot" if method == "cot" else "vae"
    train(command(tmp_path, data, "--max_iters", "6", "--method", method, stage=stage))
    assert [p.name for p in tmp_path.iterdir()] == ["vae" if method == "atp" else method]
    file = tmp_path / "x.json"
    evaluate(["--ckpt", str(tmp_path), "--data", data, "--limit", "5", "--json", str(file)])
    got = json.loads(file.read_text())
    assert got["config"]["method"] == method
    latent, stop = (METHODS[method][part] for part in ("latent", "stop"))
    assert stop or got["benchmarks"][data]["latents"] == 3 * latent


def test_evaluation_needs_only_the_checkpoint(tmp_path, rl, data, capsys):
    file = tmp_path / "x.json"
    evaluate(["--ckpt", str(rl), "--data", data, "easy", "--limit", "7", "--samples", "4", "--explain", "2",
              "--json", str(file)])
    got = json.loads(file.read_text())
    assert got["benchmarks"][data]["n"] == 7 and set(got["benchmarks"][data]) == {
        "n", "accuracy", "tokens", "latents", "coherence", "pass@1", "pass@2", "pass@4", "maj@4"}
    assert got["checkpoint"].startswith(str(rl)) and got["config"]["hidden_size"] == 16
    said, example = capsys.readouterr().out, load(data, "test")[0]
    assert example.question in said and f"reference: {example.steps[0]}" in said and " mean |" in said


def test_checkpoint_opens_in_transformers(vae):
    from transformers import LlamaForCausalLM
    ckpt = find_checkpoint(vae)
    theirs = LlamaForCausalLM.from_pretrained(ckpt, dtype=torch.float32)
    ours = LatentReasoner.from_pretrained(ckpt).policy
    tokens = torch.randint(0, ours.config.vocab_size, (2, 9))
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), atol=1e-4, rtol=1e-4)


def test_a_run_does_not_replace_its_own_start(vae, data):
    with pytest.raises(ValueError, match="another --out_dir"):
        train(command(vae, data, "--init", str(vae)))
    with pytest.raises(FileNotFoundError, match="nothing"):  # nor does one that cannot begin replace anything
        train(command(vae, "nothing"))
    assert find_checkpoint(vae / "vae")


@pytest.mark.parametrize("flags, parts", [
    ([], {"decoder", "latent_head", "stop_head"}), (["--decode", "no"], {"latent_head", "stop_head"}),
    (["--vae", "no"], {"decoder", "latent_head", "stop_head"}), (["--stop", "no"], {"decoder", "latent_head"}),
    (["--method", "simcot"], {"decoder"}), (["--method", "cot"], set()),
    (["--thoughts_per_step", "2"], {"decoder", "latent_head", "stop_head"})])
def test_init_keeps_all_parts_or_the_policy(vae, flags, parts, capsys):
    """A checkpoint with other heads gives its policy. A decoder is left out where none is asked for."""
    cfg = resolve(parse(["--stage", "vae", "--seed", "5", "--init", str(vae), *flags]))
    model, _ = build(cfg, Run(cfg, "vae"))
    saved = LatentReasoner.from_pretrained(find_checkpoint(vae)).state_dict()
    assert {k.split(".")[0] for k in model.state_dict()} == {"policy", *parts}
    whole = "only its policy is kept" not in capsys.readouterr().out
    assert whole == ("stop_head" in parts)
    kept = {k: v for k, v in model.state_dict().items() if whole or k.startswith("policy")}
    assert all(v.equal(saved[k]) for k, v in kept.items())


def test_new_tokens_begin_like_a_step(tmp_path, vae, data):
    """Those around the latents are copies of "<<", with which a step begins. A tokenizer of other weights is
    refused."""
    cfg = resolve(parse(SMALL))
    model, tokenizer = build(cfg, Run(cfg, "vae"))
    rows, [like] = model.policy.embed_tokens.weight, tokenizer.encode_ordinary("<<")
    for name in (START, END):
        assert torch.equal(rows[tokenizer.special[name]], rows[like])
    model.policy.save_pretrained(tmp_path)
    [tokenizer.eos_id] = tokenizer.add_special("<|more|>")  # an id that is needed
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its tokenizer has .* ids, its weights have rows for"):
        train(command(tmp_path / "out", data, "--init", str(tmp_path)))
    shutil.copytree(find_checkpoint(vae), tmp_path / "ckpt")
    tokenizer.save_pretrained(tmp_path / "ckpt")
    with pytest.raises(ValueError, match="its tokenizer has .* ids, its weights have rows for"):
        evaluate(["--ckpt", str(tmp_path / "ckpt"), "--data", data])


class PauseConfig(vae_module.LatentConfig):
    """Of a method that is added: learned embeddings instead of latents."""

    def __init__(self, pause, **others):
        super().__init__(**others)
        self.pause = pause


class PauseReasoner(LatentReasoner):
    def __init__(self, policy, config, decoder=None):
        super().__init__(policy, config, decoder)
        if getattr(config, "pause", False):
            self.pause = torch.nn.Parameter(torch.zeros(config.max_steps, policy.config.hidden_size))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_is_added_is_the_one_that_is_trained(tmp_path, data, method, monkeypatch, capsys):
    """Of any other method's checkpoint it takes the policy, and says so, whatever parts the two share."""
    train(command(tmp_path, data, "--max_iters", "1", "--method", method))
    monkeypatch.setitem(METHODS, "pause", {**METHODS[method], "pause": True})
    for owner in (module, vae_module):
        monkeypatch.setattr(owner, "LatentConfig", PauseConfig)
        monkeypatch.setattr(owner, "LatentReasoner", PauseReasoner)
    monkeypatch.setattr(PauseReasoner, "from_pretrained", partial(LatentReasoner.from_pretrained.__func__,
                                                                  LatentReasoner))
    cfg = resolve({"stage": "vae", "method": "pause", "init": str(tmp_path)})
    with monkeypatch.context() as patch:
        patch.setattr(vae_module, "LatentConfig", LatentConfig)  # what is on disk is of the old method
        model, _ = build(cfg, Run(cfg, "vae"))
    assert model.config.method == "pause" and "pause" in model.state_dict()
    assert "only its policy is kept" in capsys.readouterr().out


def test_a_new_run_replaces_a_broken_log(tmp_path, data):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "metrics.jsonl").write_text("a note\n")
    train(command(tmp_path, data, "--max_iters", "1"))
    assert [row["step"] for row in metrics(tmp_path / "vae")] == [1, 1]  # losses, validation


@pytest.mark.parametrize("method", METHODS)
def test_runs_are_named_by_what_they_train(tmp_path, vae, data, method):
    """--stage rl takes the run of its --method, and every folder is another."""
    names = [module.run_name(kind, m) for kind in ("vae", "rl") for m in METHODS]
    assert len(set(names)) == len(names)
    own = tmp_path / Run(Config(method=method), "vae").name
    shutil.copytree(vae / "vae", own)
    cfg = resolve(parse(["--stage", "rl", "--method", method, "--out_dir", str(tmp_path)]))
    assert cfg.init == str(find_checkpoint(own))
    assert Run(cfg, "rl").dir == tmp_path / module.run_name("rl", method)
    assert [module.run_name(kind, "atp") for kind in ("vae", "rl")] == ["vae", "rl"]


@pytest.mark.parametrize("held", ({"run": "simcot"}, {"run": "rl"}, {"run": None}))
def test_a_folder_with_a_run_of_another_kind_is_never_cleared(tmp_path, vae, data, held):
    shutil.copytree(vae / "vae", tmp_path / "vae")
    file = find_checkpoint(tmp_path) / "train.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | held))
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    with pytest.raises(ValueError, match="of another run than vae: move it, or give another --out_dir"):
        train(command(tmp_path, data, "--max_iters", "1"))
    with pytest.raises(ValueError, match="of another run or version"):
        train(command(tmp_path, data, "--max_iters", "8", "--resume"))
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


def test_rl_does_not_sample_with_an_untrained_sigma(tmp_path, data):
    """--vae is no part of its own in a checkpoint: both ways have the same heads."""
    train(command(tmp_path, data, "--max_iters", "2", "--vae", "no"))
    started = ["--max_iters", "1", "--init", str(tmp_path)]
    with pytest.raises(ValueError, match="has other parts .*VAE.* than this run asks for"):
        train(command(tmp_path, data, *started, "--vae", "yes", stage="rl"))
    train(command(tmp_path, data, *started, stage="rl"))  # with the checkpoint's own setting
    train(command(tmp_path / "b", data, *started, "--vae", "yes"))  # which trains it


def test_of_a_checkpoint_with_other_parts_the_policy_is_kept(tmp_path, data, vae, capsys):
    train(command(tmp_path, data, "--max_iters", "2", "--init", str(vae), "--method", "simcot"))
    started = ["--max_iters", "2", "--init", str(tmp_path), "--method", "atp"]
    with pytest.raises(ValueError, match="has other parts .* than this run asks for"):
        train(command(tmp_path, data, *started, stage="rl"))
    capsys.readouterr()
    train(command(tmp_path / "b", data, *started))
    start = find_checkpoint(tmp_path / "simcot")
    said = f"vae: {start} has other parts (heads, decoder): only its policy is kept\n"
    assert said in capsys.readouterr().out


def test_data_order_is_a_function_of_seed_and_step():
    n, size = 10, 4
    stream = [i for step in range(10) for i in batch_indices(3, step, n, size)]
    for epoch in range(4):
        assert sorted(stream[epoch * n:(epoch + 1) * n]) == list(range(n))
    assert stream[:n] != stream[n:2 * n]
    assert batch_indices(3, 7, n, size) == stream[28:32]
    assert len(batch_indices(0, 0, 3, 8)) == 8  # a data set smaller than the batch


# --- the default job ---

def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_all_stages_in_turn_and_resume(tmp_path, data, capsys, monkeypatch):
    """The default job, small: --resume after it was stopped before the RL stage, and its closing table, which
    is built from the checkpoints."""
    args = [*SMALL, "--out_dir", str(tmp_path), "--data", data, "--max_iters", "4", "--baseline", "4"]

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "train_rl", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(args)
    train([*args, "--resume"])
    assert {p.name for p in tmp_path.iterdir()} == {"nocot", "vae", "rl"}
    rows = dict(zip(("answer only (nocot)", "latents, imitation (vae)", "latents, active planning (rl)"),
                    ("nocot", "vae", "rl")))
    lines = [cells(line) for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    table = {label: rest for label, *rest in lines}
    assert table.keys() == {"", "---", *rows} and table[""][0] == data
    for label, stage in rows.items():
        ckpt = find_checkpoint(tmp_path / stage)
        tokenizer = Tokenizer.from_pretrained(ckpt)
        held_out, _ = encode_all(load(data, "valid"), tokenizer, 256)  # a file's "test" is all of it
        got, _ = figures_of(LatentReasoner.from_pretrained(ckpt), tokenizer, held_out)
        shown = dict(zip(table[""], table[label]))
        assert shown[data] == f"{100 * got['accuracy']:.1f}" and shown["tokens"] == f"{got['tokens']:.2f}"


@pytest.mark.parametrize("task, sets", [("builtin", ["in_dist", "hard", "reworded", "easy"]),
                                        ("chain", ["chain"])])
def test_closing_table_is_of_the_task_trained_on(task, sets, vae, monkeypatch, capsys):
    seen = []

    def measured(model, tokenizer, encoded, **_):
        seen.append((encoded[0].example.id.split(":")[0], len(encoded)))
        return {"n": len(encoded), "accuracy": 0.5, "tokens": 2.0, "latents": 0.0, "coherence": 0.0}, []

    monkeypatch.setattr(eval, "evaluate", measured)
    report(resolve(parse(["--data", task])), [("untrained", vae)])
    assert seen == [(f"{name}_test.txt", 1000) for name in sets]
    head, _, row = capsys.readouterr().out.splitlines()
    assert cells(head)[:1 + len(sets)] == ["", *sets] and cells(row)[:2] == ["untrained", "50.0"]


def test_answer_only_makes_as_many_steps_as_imitation(tmp_path, data, capsys):
    for method, examples in (("atp", 16), ("nocot", 57)):
        train(command(tmp_path / method, data, "--method", method, "--annotated", "16",
                      "--cot_epochs", "1", "--epochs_per_stage", "1", "--final_epochs", "0"))
        assert f"{examples} examples, 8 steps of 8" in capsys.readouterr().out


def test_curriculum():
    cfg = Config(cot_epochs=2, epochs_per_stage=1, final_epochs=3, batch_size=10, max_steps=3)
    assert curriculum(cfg, True, 100) == [(0, 0, 20), (1, 20, 30), (2, 30, 40), (3, 40, 50), (4, 50, 80)]
    assert curriculum(cfg, False, 100) == [(0, 0, 80)]
    cfg.max_iters = 8
    assert curriculum(cfg, True, 100) == [(0, 0, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (4, 5, 8)]


# --- settings ---

def test_rl_continues_settings_of_the_checkpoint(vae):
    cfg = resolve(parse(["--stage", "rl", "--init", str(vae), "--rl_lr", "1e-5"]))
    assert (cfg.hidden_size, cfg.max_steps, cfg.group, cfg.rl_lr) == (16, 3, 4, 1e-5)


@pytest.fixture
def llama(tmp_path, vae):
    """A Hugging Face LLaMA: no checkpoint of ours."""
    LatentReasoner.from_pretrained(find_checkpoint(vae / "vae")).policy.save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def test_annotated_is_a_default_of_the_builtin_task_alone(vae, data, llama):
    def given(*flags):
        return resolve(parse(flags)).annotated

    assert 0 < given() < 40000 and given("--data", data) == given("--data", "chain") == 0
    assert given("--data", data, "--annotated", "7") == 7
    assert given("--init", str(vae)) == 0  # trained on `data`
    assert given("--init", llama) == given("--init", llama, "--data", "builtin") == 0


def test_chain_has_defaults_of_its_own(vae):
    """5,000 steps from nothing, for the answer-only model too. What --init continues keeps its settings."""
    cfg = resolve(parse(["--data", "chain", "--warmup", "7"]))
    epochs = cfg.cot_epochs + cfg.max_steps * cfg.epochs_per_stage + cfg.final_epochs
    assert (epochs * 40000 / cfg.batch_size, cfg.baseline, cfg.warmup) == (pytest.approx(5000), 5000, 7)
    assert resolve(parse(["--data", "chain", "--cot_epochs", "2"])).cot_epochs == 2
    kept = [resolve(parse(["--init", str(vae), *flags])).final_epochs for flags in ([], ["--data", "chain"])]
    assert kept[0] == kept[1]


def test_a_pretrained_llama_has_the_released_recipe(llama):
    """METHOD, section 10: what the paper's code and configuration have."""
    cfg = resolve(parse(["--init", llama]))
    assert (cfg.data, cfg.cot_epochs, cfg.max_steps, cfg.thoughts_per_step) == ("gsm8k_aug", 0, 10, 2)
    assert (cfg.lr, cfg.min_lr, cfg.warmup, cfg.grad_clip) == (1e-4, 1, 0, 0)
    assert (cfg.weight_decay, cfg.decay_all, cfg.beta2) == (0.01, True, 0.999)
    assert (cfg.rl_lr, cfg.questions_per_step, cfg.group, cfg.minibatch, cfg.rl_iters) == (1e-6, 16, 8, 16, 0)
    assert (cfg.rl_grad_clip, cfg.latent_grad, cfg.std_norm, cfg.latent_mean) == (1, "score", True, False)
    assert (cfg.w_acc, cfg.w_fmt, cfg.w_coh, cfg.beta_kl, cfg.decode_coef) == (1, 0.5, 0.1, 1e-3, 1)
    for method, steps, epochs in (("atp", 10, 2), ("simcot", 3, 3), ("coconut", 3, 3), ("cot", 10, 2)):
        cfg = resolve(parse(["--init", llama, "--method", method]))
        assert (cfg.max_steps, cfg.epochs_per_stage) == (steps, epochs)
        assert cfg.epochs_per_stage * cfg.max_steps + cfg.final_epochs == 25
    assert resolve(parse(["--init", llama, "--method", "coconut", "--max_steps", "5"])).max_steps == 5


def test_settings_name_fields():
    """Presets are valid settings. What a resumed run may change, or a new one does not take over, exists."""
    for name, values in PRESETS.items():
        assert vars(Config(**values)).items() >= values.items() and values["preset"] == name
    assert RESUMABLE | NOT_INHERITED | module.THREE_STEPS.keys() <= FIELDS.keys()


def steps_of(*flags):
    cfg = resolve(parse(flags))
    return cfg.method, cfg.max_steps, cfg.epochs_per_stage, cfg.final_epochs, cfg.cot_epochs


def saved(folder, **settings):
    """A checkpoint with the settings that a run with these would have saved."""
    ckpt = folder / "step-0000001"
    ckpt.mkdir(parents=True)
    (ckpt / "train.json").write_text(json.dumps({"step": 1, "config": vars(resolve(settings))}))
    (ckpt / "latent.json").touch()
    return str(folder)


def test_pretrained_methods_have_their_steps_whatever_they_start_from(tmp_path, llama):
    """CoT -> Coconut -> SIM-CoT, then ATP: 3 steps of 2 for the former, 10 for the latter. Text is learned
    once."""
    cot = saved(tmp_path / "cot", stage="cot", init=llama)
    assert steps_of("--stage", "vae", "--init", cot)[:2] == ("atp", 10)
    coconut = ["--stage", "vae", "--method", "coconut", "--init", cot]
    assert steps_of(*coconut) == ("coconut", 3, 3, 16, 0)
    assert steps_of(*coconut, "--max_steps", "5", "--cot_epochs", "1") == ("coconut", 5, 3, 16, 1)
    coconut = saved(tmp_path / "coconut", init=cot, method="coconut")
    assert steps_of("--init", coconut, "--method", "simcot") == ("simcot", 3, 3, 16, 0)
    assert steps_of("--init", coconut, "--method", "atp") == ("atp", 10, 2, 5, 0)
    simcot = saved(tmp_path / "simcot", init=coconut, method="simcot", max_steps=4)
    assert steps_of("--init", simcot, "--stage", "rl")[:2] == ("simcot", 4)  # the same method: as it was


def test_text_is_not_learned_twice(tmp_path):
    """From nothing too. Steps are then as the earlier run had them."""
    cot = saved(tmp_path / "cot", stage="cot", max_steps=4)
    assert steps_of("--init", cot) == ("atp", 4, 1.2, 9.6, 0)
    assert steps_of("--init", cot, "--method", "coconut", "--cot_epochs", "2") == ("coconut", 4, 1.2, 9.6, 2)
    coconut = saved(tmp_path / "coconut", method="coconut")
    assert steps_of("--init", coconut, "--method", "simcot")[-1] == 0
    assert steps_of("--init", coconut)[-1] == 12  # the same method goes on as it was
    nocot = saved(tmp_path / "nocot", method="nocot")
    assert steps_of("--init", nocot, "--method", "atp")[-1] == 12  # it has not seen a step


def test_home_folder_in_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    paths = ("out_dir", "init", "data", "data_dir")
    given = parse([f"--{name}=~/a" for name in paths])
    assert given == dict.fromkeys(paths, "/home/somebody/a")


@pytest.mark.parametrize("stage, flags, precision", [
    ("rl", ["--latent_grad", "score"], "highest"), ("rl", ["--latent_grad", "path"], "high"),
    ("vae", ["--latent_grad", "score"], "high"), ("vae", ["--dtype", "float32"], "highest")])
def test_densities_are_computed_without_tf32(stage, flags, precision):
    before = torch.get_float32_matmul_precision()
    try:
        Run(resolve(parse(flags)), stage)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_help_lists_every_setting(llama, capsys):
    """With its defaults: of the built-in task, of chain, of a pretrained LLaMA, where these differ."""
    with pytest.raises(SystemExit) as e:
        parse(["--help"])
    said = capsys.readouterr().out.splitlines()
    assert e.value.code == 0
    [head] = [line for line in said if line.split() == ["setting", "default", "chain", "pretrained"]]
    ends = [head.index(name) + len(name) for name in ("default", "chain", "pretrained")]  # right-aligned
    cases = [Config(), resolve(parse(["--data", "chain"])), resolve(parse(["--init", llama]))]
    for f in dataclasses.fields(Config):
        [line] = [line for line in said if line.startswith(f"  --{f.name} ")]
        shown = [line[len(f"  --{f.name}"):ends[0]], line[ends[0]:ends[1]], line[ends[1]:ends[2]]]
        for text, cfg in zip(map(str.strip, shown), cases):
            if f.name not in ("init", "data", "annotated") or cfg is cases[0]:  # these make the case
                value = getattr(cfg, f.name)
                assert text == str(value) or (not text and value == f.default and cfg is not cases[0])
        assert line[ends[2]:].strip()  # a note


@pytest.mark.parametrize("everything", (False, True))
def test_weight_decay_of_matrices_or_of_everything(everything):
    """Without a gradient AdamW only decays: p becomes (1 - lr * decay) p."""
    switch = ["--decay_all"] if everything else []
    cfg = resolve(parse([*SMALL, "--lr", "0.1", "--weight_decay", "0.5", *switch]))
    model, _ = build(cfg, Run(cfg, "vae"))
    optimizer = make_optimizer(model, cfg, cfg.weight_decay)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    before = {}
    for name, p in model.named_parameters():
        p.data.uniform_(1, 2)
        before[name], p.grad = p.detach().clone(), torch.zeros_like(p)
    optimizer.step()
    assert {p.dim() for p in model.parameters()} == {1, 2}
    for name, p in model.named_parameters():
        share = 0.95 if p.dim() > 1 or everything else 1.0
        torch.testing.assert_close(p.detach(), share * before[name])


@pytest.mark.parametrize("clip, norm", [(0.0, 5.0), (1.0, 1.0), (7.0, 5.0)])
def test_clip_0_leaves_gradients_alone(clip, norm):
    """The norm that is logged is that before clipping."""
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, -4.0])
    run, optimizer = Run(Config(), "vae"), torch.optim.SGD([p])
    run.step = 8
    assert run.clip_gradients(optimizer, clip) == pytest.approx(5)
    torch.testing.assert_close(p.grad, torch.tensor([3.0, -4.0]) * norm / 5)
    p.grad[0] = float("inf")
    with pytest.raises(FloatingPointError, match="step 9: the gradient norm is inf"):
        run.clip_gradients(optimizer, clip)


# --- user errors ---

def command_line(script, *args):
    whole = [sys.executable, str(ROOT / script), *args]
    return subprocess.run(whole, capture_output=True, text=True, timeout=3600)  # against a hang alone


@pytest.mark.parametrize("args, words", [
    (["--lr", "fast"], "--lr"), (["--learning_rate", "1"], "--learning_rate"),
    (["--method", "magic"], "--method"), (["--init", "nowhere"], "nowhere"),
    (["--stage", "rl", "--out_dir", "nowhere"], "nowhere"),
    (["--heads", "5"], "--heads"), (["--minibatch", "7"], "--minibatch"), (["--group", "1"], "--group"),
    (["--group", "4"], "--minibatch 512: with --questions_per_step 64, --group 4 it is 64 x a divisor of 4"),
    (["--epochs", "3"], "--epochs 3"), (["--micro_batch", "0"], "--micro_batch"),
    (["--init", "meta-llama/Llama-3.2-1B-Instruct"], "no folder with config.json of a downloaded model"),
    (["--init", "."], "no folder with config.json of a downloaded model"),
    (["--lr", "nan"], "--lr"), (["--lr", "-1"], "--lr"), (["--data", "nothing"], "nothing"),
    (["--stage", "vae", "--data", "gsm8k", "--data_dir", "nowhere"], "data.py gsm8k"),
    (["--batch_size", "0"], "--batch_size"), (["--rl_grad_clip", "inf"], "--rl_grad_clip"),
    (["--max_steps", "256"], "--max_steps"), (["--method", "simcot", "--vae", "yes"], "--vae"),
    (["--method", "cot", "--decode", "yes"], "--decode"),
    (["--stage", "cot", "--method", "simcot"], "--stage cot"),
])
def test_user_errors_of_train(args, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        cli(lambda: train(args))
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and err.count("\n") == 1 and err.startswith("error: "), err
    assert not list(tmp_path.iterdir())  # nothing written


def test_command_lines_really_exit_2(tmp_path):
    for script, args in (("train.py", ["--lr", "fast"]), ("eval.py", ["--ckpt", str(tmp_path)])):
        done = command_line(script, *args)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_coherence_alone_needs_a_decoder(tmp_path, warm, data):
    flags = ["--init", str(warm), "--decode", "no", "--w_acc", "0", "--w_coh", "1"]
    with pytest.raises(ValueError, match="--w_acc 0 --w_coh 1.0: .* has no decoder"):
        train(command(tmp_path, data, *flags, stage="rl"))


def test_compile_needs_a_compiler(tmp_path, data, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="--compile yes on a CPU needs a C.. compiler: .* no-such-compiler"):
        train(command(tmp_path, data, "--compile", "yes"))
    assert not list(tmp_path.iterdir())


def python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)


def test_a_system_without_fcntl_is_one_line():
    done = python("import sys; sys.modules['fcntl'] = None; import train")
    assert done.returncode == 1 and done.stderr == (
        "error: train.py runs on Linux and macOS; this Python has no fcntl\n")


def test_nohup_is_respected():
    code = "import signal; {}; import train; print(signal.SIGHUP in train.ASK_TO_STOP)"
    ignore = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    assert [python(code.format(first)).stdout for first in (ignore, ignore.replace("IGN", "DFL"))] == ["False\n", "True\n"]


@pytest.mark.parametrize("number", ("ENOSYS", "ENOLCK", "EOPNOTSUPP"))
def test_a_disk_without_locks_is_a_warning(tmp_path, data, number, monkeypatch, capsys):
    def flock(*_):
        raise OSError(getattr(errno, number), "no locks")

    monkeypatch.setattr(module.fcntl, "flock", flock)
    train(command(tmp_path, data, "--max_iters", "1"))
    assert capsys.readouterr().out.count("warning: no locks on the disk of") == 1
    assert find_checkpoint(tmp_path / "vae").name == "step-0000001"


# --- ends and resumes ---

def test_a_stdout_that_nobody_reads_ends_no_run(tmp_path, vae, data):
    """As after `| head -1`: the pipe is broken from the first line on."""
    read, write = os.pipe()
    os.close(read)
    args = command(tmp_path, data, "--max_iters", "8")
    whole = [sys.executable, str(ROOT / "train.py"), *args]
    done = subprocess.run(whole, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")
    assert_same(weights(tmp_path, "vae"), weights(vae, "vae"), exact=True)


def test_resume_refuses_other_training_data(tmp_path, vae, data):
    """Of the same name and as many questions. What it began with is taken again."""
    shutil.copytree(vae / "vae", tmp_path / "vae")
    resume, raw = ["--stage", "vae", "--resume", "--out_dir", str(tmp_path)], Path(data).read_text()
    lines = raw.splitlines(keepends=True)
    log = (tmp_path / "vae" / "metrics.jsonl").read_bytes()
    try:
        Path(data).write_text("".join([lines[1], lines[0], *lines[2:]]))
        with pytest.raises(ValueError, match=f"--data {data}: not the training data that .* was trained on"):
            train(resume)
    finally:
        Path(data).write_text(raw)
    assert (tmp_path / "vae" / "metrics.jsonl").read_bytes() == log
    train(resume)


def test_validation_takes_the_run_s_own_limit(tmp_path, warm, data, monkeypatch):
    """And its checkpoint says it to eval.py."""
    seen, real = [], module.evaluate
    monkeypatch.setattr(module, "evaluate", lambda *a, **k: seen.append(k["max_answer"]) or real(*a, **k))
    train(command(tmp_path, data, "--max_iters", "1", "--max_answer", "5", "--init", str(warm), stage="rl"))
    assert seen == [5, 5]
    assert json.loads((find_checkpoint(tmp_path) / "train.json").read_text())["config"]["max_answer"] == 5


@pytest.mark.parametrize("stage", ("vae", "rl"))
def test_gradient_that_is_not_finite_stops_before_the_step(tmp_path, data, warm, stage, monkeypatch):
    """Weights and the last checkpoint stay."""
    clip, collate, objective, seen = Run.clip_gradients, module.collate, rl_module.objective, []

    def poisoned_batch(*args):
        batch = collate(*args)
        if len(seen) == 2:
            batch = batch._replace(target_weight=float("nan"))
        return batch

    def poisoned_loss(*args):
        loss, stats = objective(*args)
        return loss * (float("nan") if len(seen) == 2 else 1.0), stats

    def watched(run, *args):
        seen.append((run.model, {k: v.clone() for k, v in run.model.state_dict().items()}))
        return clip(run, *args)

    monkeypatch.setattr(Run, "clip_gradients", watched)
    monkeypatch.setattr(module, "collate", poisoned_batch)
    monkeypatch.setattr(rl_module, "objective", poisoned_loss)
    rewards = rl_module.compute_rewards  # unlike ones in each group, or there would be no step
    monkeypatch.setattr(rl_module, "compute_rewards", lambda *args: rewards(*args) | {"reward": torch.arange(16.0)})
    flags = ["--save_every", "1", "--minibatch", "16", *stage_flags(stage, warm)]  # one update a batch
    with pytest.raises(FloatingPointError, match="step 3: the gradient norm is nan"):
        train(command(tmp_path, data, *flags, stage=stage))
    model, before = seen[2]
    assert len(seen) == 3 and all(v.equal(before[k]) for k, v in model.state_dict().items())
    assert find_checkpoint(tmp_path / stage).name == "step-0000002"


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, vae, data, monkeypatch):
    real, others = module.collate, []

    def collate(*args):  # while this run goes on, another begins
        if not others:
            others.append(command_line("train.py", *command(tmp_path, data, "--max_iters", "2")))
        return real(*args)

    monkeypatch.setattr(module, "collate", collate)
    train(command(tmp_path, data, "--max_iters", "8"))
    error = others[0].stderr
    assert others[0].returncode == 2 and error.startswith("error: ") and "another run" in error, error
    assert_same(weights(tmp_path, "vae"), weights(vae, "vae"), exact=True)
    train(command(tmp_path, data, "--max_iters", "2"))  # the folder is free again


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1))
def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path, vae, data, number, monkeypatch):
    """The step is finished, the checkpoint written, the exit status 128 + signal; --resume needs no setting
    again."""
    real, calls, before = module.collate, [], signal.getsignal(number)

    def collate(*args):  # once a step
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), number)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "collate", collate)
        patch.setattr(module, "ASK_TO_STOP", module.ASK_TO_STOP | {number})  # the tests may run under nohup
        with pytest.raises(SystemExit) as e:
            train(command(tmp_path, data, "--max_iters", "8"))
    assert e.value.code == 128 + number and signal.getsignal(number) is before
    assert find_checkpoint(tmp_path / "vae").name == "step-0000005"
    train(["--stage", "vae", "--resume", "--out_dir", str(tmp_path)])
    assert_same(weights(tmp_path, "vae"), weights(vae, "vae"), exact=True)


def test_a_second_signal_stops_at_once():
    run = Run(Config(), "vae")
    before = {number: signal.signal(number, run.ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    os.kill(os.getpid(), signal.SIGTERM)
    assert run.asked_to_stop()
    assert [signal.signal(number, before[number]) for number in before] == [signal.SIG_DFL] * 2


@pytest.fixture
def rl_at_1(tmp_path, warm, data, monkeypatch):
    """Stops RL at its first step. What it began with, out/vae, is moved away."""
    def stopped(*flags):
        shutil.copytree(warm / "vae", tmp_path / "vae")
        with monkeypatch.context() as patch:
            patch.setattr(Run, "asked_to_stop", lambda run: True)
            with pytest.raises(SystemExit):
                train(command(tmp_path, data, "--max_iters", "3", *flags, stage="rl"))
        assert find_checkpoint(tmp_path / "rl").name == "step-0000001"
        (tmp_path / "vae").rename(tmp_path / "moved")
        return ["--stage", "rl", "--resume", "--out_dir", str(tmp_path)]
    return stopped


def test_resume_takes_the_divergence_from_the_same_start(tmp_path, rl, rl_at_1):
    """Wherever that is by now; an empty place is refused."""
    resume = rl_at_1()
    with pytest.raises(FileNotFoundError, match="--kl_coef needs .*vae.*, which is gone .--init"):
        train(resume)
    train([*resume, "--init", str(tmp_path / "moved")])
    assert_same(weights(tmp_path, "rl"), weights(rl, "rl"), exact=True)


def test_without_divergence_resume_needs_only_its_own_checkpoint(tmp_path, warm, data, rl_at_1):
    train(rl_at_1("--kl_coef", "0"))
    train(command(tmp_path / "whole", data, "--max_iters", "3", "--kl_coef", "0", "--init", str(warm),
                  stage="rl"))
    assert_same(weights(tmp_path, "rl"), weights(tmp_path / "whole", "rl"), exact=True)


@pytest.mark.parametrize("flag, value, was", [
    ("lr", "0.5", "0.0015"), ("seed", "3", "0"), ("max_iters", "9", "8")])
def test_resume_refuses_to_become_another_run(vae, data, flag, value, was):
    flags = ["--max_iters", "8", "--resume", f"--{flag}", value]
    said = f"--{flag} {value}: --resume goes on with a run that has --{flag} {was} "
    with pytest.raises(ValueError, match=said):
        train(command(vae, data, *flags))
    assert flag not in RESUMABLE and "keep" in RESUMABLE


def test_the_newest_checkpoints_are_kept(tmp_path, data):
    """Only the newest has the optimizer."""
    train(command(tmp_path, data, "--max_iters", "8", "--eval_every", "1", "--save_every", "1", "--keep", "2",
                  "--method", "nocot"))
    found = sorted((tmp_path / "nocot").glob("step-*"))
    assert [p.name for p in found] == ["step-0000007", "step-0000008"]
    names = [{f.name for f in p.iterdir()} for p in found]
    assert names[1] == {*names[0], "optimizer.safetensors"} != names[0]
    old, new = (LatentReasoner.from_pretrained(p).state_dict() for p in found)  # both open
    assert not old["policy.norm.weight"].equal(new["policy.norm.weight"])


@pytest.mark.parametrize("broken", ("save_tensors", "replace"))
def test_a_full_disk_is_one_line_and_earlier_checkpoints_stand(tmp_path, data, broken, monkeypatch, capsys):
    owner = module if broken == "save_tensors" else os
    real = getattr(owner, broken)

    def full(*args):
        if "0000002" in str(args[1]):
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(owner, broken, full)
    with pytest.raises(SystemExit) as e:
        cli(lambda: train(command(tmp_path, data, "--max_iters", "4", "--save_every", "1")))
    said = capsys.readouterr().err
    assert e.value.code == 1 and said.count("\n") == 1 and "step-0000002" in said and "No space left" in said
    assert sorted(p.name for p in (tmp_path / "vae").iterdir()) == ["metrics.jsonl", "step-0000001"]
    assert find_checkpoint(tmp_path / "vae").name == "step-0000001"
    assert (find_checkpoint(tmp_path / "vae") / "optimizer.safetensors").exists()


@pytest.mark.parametrize("broken", ("disk", "folder"))
def test_metrics_that_cannot_be_written_are_one_line(tmp_path, broken, capsys):
    """A full disk says so only when the file is closed; a folder that somebody removed, when it is opened."""
    run = Run(Config(out_dir=str(tmp_path)), "vae")
    if broken == "disk":
        run.dir.mkdir()
        (run.dir / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as e:
        cli(lambda: run.log(0))
    err = capsys.readouterr().err
    assert e.value.code in (1, 2) and "No s" in err and err.count("\n") == 1


def test_resume_refuses_what_would_break_it(tmp_path, vae, data):
    """A state of AdamW that is cut, of other sizes or with other names, and a train.json without what resuming
    needs, are one line that names the file. The log of the run stands."""
    shutil.copytree(vae / "vae", tmp_path / "vae")
    ckpt, resume = find_checkpoint(tmp_path / "vae"), ["--stage", "vae", "--resume", "--out_dir", str(tmp_path)]
    file, log = ckpt / "optimizer.safetensors", (tmp_path / "vae" / "metrics.jsonl").read_bytes()
    state, raw = load_file(file), file.read_bytes()
    name, model = "exp_avg.policy.embed_tokens.weight", LatentReasoner.from_pretrained(ckpt)
    for change in ({name: state[name][:9]}, {name: state[name].long()}, {"exp_avg.bogus": torch.ones(2)},
                   {name: None}):
        save_file({k: v for k, v in {**state, **change}.items() if v is not None}, file)
        with pytest.raises(ValueError, match="optimizer.safetensors.*exp_avg"):
            make_optimizer(model, Config(), 0.0, ckpt)
    file.write_bytes(raw[:-9])
    with pytest.raises(ValueError, match="optimizer.safetensors: not a readable"):
        make_optimizer(model, Config(), 0.0, ckpt)
    file.write_bytes(raw)
    whole = json.loads((ckpt / "train.json").read_text())
    for change in ({"logged": None}, {"logged": -1}, {"logged": "x"}, {"step": -1}):
        (ckpt / "train.json").write_text(json.dumps({**whole, **change}))
        with pytest.raises(ValueError, match="train.json: broken or of another run or version"):
            train(resume)
    assert (tmp_path / "vae" / "metrics.jsonl").read_bytes() == log


def test_a_log_that_is_removed_costs_no_checkpoint(tmp_path, data, monkeypatch):
    real, file = module.collate, tmp_path / "vae" / "metrics.jsonl"
    monkeypatch.setattr(module, "collate", lambda *args: file.unlink(missing_ok=True) or real(*args))
    train(command(tmp_path, data, "--max_iters", "2", "--log_every", "5"))
    assert find_checkpoint(tmp_path / "vae").name == "step-0000002"


@pytest.mark.parametrize("stage, rows, advice", [
    ("vae", "6", "--micro_batch 3"), ("vae", "64", "--micro_batch 4"), ("rl", "64", "--micro_batch 4")])
def test_out_of_memory_is_one_line(tmp_path, warm, data, stage, rows, advice, monkeypatch, capsys):
    """Half of what a pass had: --micro_batch, or the whole batch where that is smaller. Exit status 1."""
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "backward", full)
    with pytest.raises(SystemExit) as e:
        flags = [*stage_flags(stage, warm), "--micro_batch", rows]
        cli(lambda: train(command(tmp_path, data, *flags, stage=stage)))
    # the interpreter prints a text that SystemExit has, and its exit status is 1
    assert e.value.code == f"error: out of memory: try {advice}"


def test_optimizer_state_is_loaded_to_the_parameters_device(tmp_path):
    """All of it: on a GPU fused AdamW wants its count of steps there too."""
    model = torch.nn.ParameterDict({"p": torch.nn.Parameter(torch.empty(2, 2, device="meta"))})
    state = {"step.p": torch.tensor(1.0), "exp_avg.p": torch.ones(2, 2), "exp_avg_sq.p": torch.ones(2, 2)}
    save_file(state, tmp_path / "optimizer.safetensors")
    optimizer = make_optimizer(model, Config(), 0.0, tmp_path)
    state = optimizer.state[model["p"]]
    assert {v.device.type for v in state.values()} == {"meta"} and state["step"].dim() == 0
