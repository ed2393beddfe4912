"""Training and evaluation from the command line: processes, accumulation, resume, settings, user errors."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data import builtin_tokenizer, load
from eval import find_checkpoint, run_main
from eval import main as evaluate
from faults import differences, finish, metrics, start
from safetensors.torch import load_file, save_file
from train import Config, Run, batch_indices, build, check, curriculum, load_optimizer, parse, read_data, report, resolve
from train import main as train
from vae import END, START, LatentReasoner

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--hidden_size", "16", "--layers", "1", "--heads", "2", "--intermediate_size", "24", "--batch_size", "8",
         "--micro_batch", "8", "--max_steps", "3", "--eval_every", "0", "--eval_size", "4", "--log_every", "1",
         "--threads", "1", "--warmup", "2", "--questions_per_step", "4", "--group", "4", "--minibatch", "8",
         "--rl_lr", "1e-3", "--rl_warmup", "1", "--kl_coef", "0.05"]


def command(out, data, *flags, stage="vae"):
    return [*SMALL, "--stage", stage, "--out_dir", str(out), "--data", data, *flags]


def weights(out, stage):
    ckpt = find_checkpoint(Path(out) / stage)
    files = sorted(ckpt.rglob("*.safetensors"))
    assert len(files) == 4  # policy, decoder, heads, optimizer
    return {f"{f.relative_to(ckpt)}:{k}": v for f in files for k, v in load_file(f).items()}


def assert_same(a, b, exact=False):
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(a[k], b[k], msg=lambda m: f"{k}: {m}", **(dict(atol=0, rtol=0) if exact else dict(atol=2e-5, rtol=1e-3)))


def test_rl_moves_all_but_the_decoder(warm, rl):
    before, after = weights(warm, "vae"), weights(rl, "rl")
    moved = {k.split(":")[0] + ("" if "heads" not in k else k.split(":")[1].split(".")[0]) for k in before
             if not k.startswith("optimizer") and not before[k].equal(after[k])}
    assert moved == {"model.safetensors", "heads.safetensorslatent_head", "heads.safetensorsstop_head"}


def assert_logged_the_same(a, b, stage):
    a, b = metrics(Path(a) / stage), metrics(Path(b) / stage)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b):
        x, y = ({k: v for k, v in {**row, **row.get("valid", {})}.items() if k not in ("valid", "stage")} for row in (x, y))
        assert x == pytest.approx(y, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("stage", ("vae", "rl"))
def test_two_processes_equal_one(tmp_path, vae, warm, rl, data, stage):
    """Same global batch, same rollouts: the same parameters and optimizer state after several steps."""
    flags = ["--max_iters", "8"] if stage == "vae" else ["--max_iters", "3", "--init", str(warm)]
    finish(start(*command(tmp_path, data, *flags, stage=stage), processes=2))
    assert_same(weights(tmp_path, stage), weights(vae if stage == "vae" else rl, stage))
    assert_logged_the_same(tmp_path, vae if stage == "vae" else rl, stage)


@pytest.mark.parametrize("stage", ("vae", "rl"))
def test_accumulation_changes_nothing(tmp_path, vae, warm, rl, data, stage):
    flags = ["--max_iters", "8"] if stage == "vae" else ["--max_iters", "3", "--init", str(warm)]
    train(command(tmp_path, data, *flags, "--micro_batch", "3", stage=stage))
    assert_same(weights(tmp_path, stage), weights(vae if stage == "vae" else rl, stage))
    assert_logged_the_same(tmp_path, vae if stage == "vae" else rl, stage)


def test_same_seed_same_weights_other_seed_other_weights(tmp_path, vae, data):
    train(command(tmp_path / "a", data, "--max_iters", "8"))
    assert differences(tmp_path / "a" / "vae", vae / "vae") == []  # all files, and the metrics but for clocks
    train(command(tmp_path / "b", data, "--max_iters", "8", "--seed", "1"))
    assert not weights(tmp_path / "b", "vae")["model.safetensors:model.norm.weight"].equal(
        weights(vae, "vae")["model.safetensors:model.norm.weight"])


@pytest.mark.parametrize("method, stage, annotated, count", [
    ("atp", "vae", 0, 38), ("atp", "vae", 10, 10), ("cot", "cot", 0, 38), ("simcot", "vae", 0, 38),
    ("nocot", "nocot", 10, 57), ("atp", "rl", 10, 57)])
def test_only_imitation_needs_steps(tmp_path, data, method, stage, annotated, count):
    """60 questions, the last 3 for validation; every third shows no steps."""
    lines = Path(data).read_text().splitlines()
    file = tmp_path / "questions.txt"
    file.write_text("\n".join(s if i % 3 else f"{s.split('||')[0]}|| ####{s.split('####')[1]}" for i, s in enumerate(lines)))
    cfg = Config(data=str(file), method=method, annotated=annotated)
    run = Run(cfg, stage)
    model, tokenizer = build(cfg, run)
    assert len(read_data(cfg, tokenizer, model, run, "train")) == count
    assert len(read_data(cfg, tokenizer, model, run, "valid")) == 3


@pytest.mark.parametrize("method", ("simcot", "coconut", "cot", "nocot"))
def test_methods_train_and_evaluate(tmp_path, data, method, capsys):
    train(command(tmp_path, data, "--max_iters", "6", "--method", method))
    evaluate(["--ckpt", str(tmp_path), "--data", data, "--limit", "5", "--json", str(tmp_path / "x.json")])
    got = json.loads((tmp_path / "x.json").read_text())
    assert got["config"]["method"] == method
    assert got["benchmarks"][data]["latents"] == {"simcot": 3, "coconut": 3, "cot": 0, "nocot": 0}[method]


def test_evaluation_needs_only_the_checkpoint(tmp_path, rl, data, capsys):
    file = tmp_path / "x.json"
    evaluate(["--ckpt", str(rl), "--data", data, "easy", "--limit", "7", "--samples", "4", "--explain", "2", "--json", str(file)])
    got = json.loads(file.read_text())
    figures = got["benchmarks"][data]
    assert figures["n"] == 7 and set(figures) == {
        "n", "accuracy", "tokens", "latents", "coherence", "pass@1", "pass@2", "pass@4", "maj@4"}
    assert got["checkpoint"].startswith(str(rl)) and got["config"]["hidden_size"] == 16
    said = capsys.readouterr().out
    example = load(data, "test")[0]
    assert example.question in said and f"reference: {example.steps[0]}" in said and "| mean |" in said


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
    with pytest.raises(ValueError, match="nothing"):  # nor does one that cannot begin replace anything
        train(command(vae, "nothing"))
    assert find_checkpoint(vae / "vae")


@pytest.mark.parametrize("flags, parts", [
    ([], {"decoder", "latent_head", "stop_head"}), (["--decode", "no"], {"latent_head", "stop_head"}),
    (["--stop", "no", "--vae", "no"], {"decoder", "latent_head"}), (["--method", "simcot"], {"decoder"}),
    (["--method", "cot"], set()), (["--thoughts_per_step", "2"], {"decoder", "latent_head", "stop_head"})])
def test_init_keeps_the_parts_that_both_have(vae, flags, parts, capsys):
    cfg = resolve(parse(["--stage", "vae", "--seed", "5", "--init", str(vae), *flags]))
    model, _ = build(cfg, Run(cfg, "vae"))
    saved = LatentReasoner.from_pretrained(find_checkpoint(vae)).state_dict()
    assert {k.split(".")[0] for k in model.state_dict()} == {"policy", *parts}
    assert all(v.equal(saved[k]) for k, v in model.state_dict().items())
    assert "made new" not in capsys.readouterr().out


def test_new_tokens_begin_like_a_step(tmp_path, vae, data):
    """Those around the latents are copies of "<<" (METHOD: what a step begins with). A tokenizer of other weights, or
    without an end, is refused."""
    cfg = resolve(parse(SMALL))
    model, tokenizer = build(cfg, Run(cfg, "vae"))
    rows, [like] = model.policy.embed_tokens.weight, tokenizer.encode("<<")
    for name in (START, END):
        assert torch.equal(rows[tokenizer.token_id(name)], rows[like])
    model.policy.save_pretrained(tmp_path)
    tokenizer.add_special("<|one|>", "<|more|>")
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its tokenizer has .* ids, its weights have rows for"):
        train(command(tmp_path / "out", data, "--init", str(tmp_path)))
    shutil.copytree(find_checkpoint(vae), tmp_path / "ckpt")
    tokenizer.save_pretrained(tmp_path / "ckpt")
    with pytest.raises(ValueError, match="its tokenizer has .* ids, its weights have rows for"):
        evaluate(["--ckpt", str(tmp_path / "ckpt"), "--data", data])


def test_init_says_which_parts_are_new(tmp_path, data, vae, capsys):
    train(command(tmp_path, data, "--max_iters", "2", "--init", str(vae), "--method", "simcot"))
    started = ["--init", str(tmp_path), "--method", "atp"]
    with pytest.raises(ValueError, match="has no latent_head; train it first"):
        train(command(tmp_path, data, "--max_iters", "2", *started, stage="rl"))
    assert "made new" not in capsys.readouterr().out
    train(command(tmp_path / "b", data, "--max_iters", "2", *started))
    assert f"not in {find_checkpoint(tmp_path / 'vae')}, made new: latent_head, stop_head\n" in capsys.readouterr().out


def test_newest_checkpoint(tmp_path):
    """The newest run's, and in a run the latest step's: a folder that was copied has files of any age."""
    def make(name, age):
        (tmp_path / name).mkdir(parents=True)
        for file in ("train.json", "latent.json"):
            (tmp_path / name / file).touch()
            os.utime(tmp_path / name / file, (age, age))
    make("a/step-0000002", 5)
    make("a/step-0000001", 9)
    make("b/step-0000007", 8)
    assert find_checkpoint(tmp_path) == tmp_path / "a/step-0000002"
    assert find_checkpoint(tmp_path / "b") == tmp_path / "b/step-0000007"


def test_all_stages_in_turn_and_resume(tmp_path, data, capsys, monkeypatch):
    """The default job, small: its table, and --resume after it was stopped before the RL stage."""
    import train as module
    args = [*SMALL, "--out_dir", str(tmp_path), "--data", data, "--max_iters", "4", "--baseline", "4"]

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "train_rl", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(args)
    splits = set()
    monkeypatch.setattr(module, "load", lambda name, split, *where: splits.add(split) or load(name, split, *where))
    train([*args, "--resume"])
    assert splits == {"train", "valid"}  # a file's "test" is all of it: the table is of what was held out
    said = capsys.readouterr().out
    assert all(f"| {row}" in said for row in ("answer only (nocot)", "latents, imitation (vae)", "latents, active planning (rl)"))
    assert {p.name for p in tmp_path.iterdir()} == {"nocot", "vae", "rl"}


def test_rl_continues_settings_of_the_checkpoint(vae):
    cfg = resolve(parse(["--stage", "rl", "--init", str(vae), "--rl_lr", "1e-5"]))
    assert (cfg.hidden_size, cfg.max_steps, cfg.group, cfg.rl_lr) == (16, 3, 4, 1e-5)


def test_annotated_is_a_default_of_the_builtin_task_alone(vae, data, tmp_path):
    def given(*flags):
        return resolve(parse(flags)).annotated

    assert 0 < given() < 40000 and given("--data", data) == given("--data", "chain") == 0 and given("--data", data, "--annotated", "7") == 7
    assert given("--init", str(vae)) == 0  # trained on `data`
    LatentReasoner.from_pretrained(find_checkpoint(vae / "vae")).policy.save_pretrained(tmp_path)
    assert given("--init", str(tmp_path)) == given("--init", str(tmp_path), "--data", "builtin") == 0


def test_chain_has_defaults_of_its_own(vae):
    """5,000 steps from nothing, for the answer-only model as well; what --init continues keeps its settings."""
    cfg = resolve(parse(["--data", "chain", "--warmup", "7"]))
    epochs = cfg.cot_epochs + cfg.max_steps * cfg.epochs_per_stage + cfg.final_epochs
    assert (epochs * 40000 / cfg.batch_size, cfg.baseline, cfg.warmup) == (pytest.approx(5000), 5000, 7)
    assert resolve(parse(["--data", "chain", "--cot_epochs", "2"])).cot_epochs == 2
    assert resolve(parse(["--data", "chain", "--init", str(vae)])).final_epochs == resolve(parse(["--init", str(vae)])).final_epochs


@pytest.mark.parametrize("task, sets", [("builtin", ["in_dist", "hard", "reworded", "easy"]), ("chain", ["chain"])])
def test_closing_table_is_of_the_task_trained_on(task, sets, vae, monkeypatch, capsys):
    model, tokenizer = LatentReasoner.from_pretrained(find_checkpoint(vae)), builtin_tokenizer()
    monkeypatch.setattr("train.evaluate", lambda model, tokenizer, encoded: ({"n": len(encoded), "accuracy": 0.5, "tokens": 2.0,
                                                                            "latents": 0.0, "coherence": 0.0}, []))
    report(resolve(parse(["--data", task])), {"untrained": (model, tokenizer)})
    assert capsys.readouterr().out.splitlines()[0] == "|  | " + " | ".join([*sets, "mean", "tokens", "coherence"]) + " |"


def test_answer_only_makes_as_many_steps_as_imitation(tmp_path, data, capsys):
    for method in ("atp", "nocot"):
        train(command(tmp_path / method, data, "--method", method, "--annotated", "16", "--cot_epochs", "1",
                      "--epochs_per_stage", "1", "--final_epochs", "0"))
        examples = {"atp": 16, "nocot": 57}[method]
        assert f"{examples} examples, 8 steps of 8" in capsys.readouterr().out


def test_data_order_is_a_function_of_seed_and_step():
    n, size = 10, 4
    stream = [i for step in range(10) for i in batch_indices(3, step, n, size)]
    for epoch in range(4):
        assert sorted(stream[epoch * n:(epoch + 1) * n]) == list(range(n))
    assert stream[:n] != stream[n:2 * n]
    assert batch_indices(3, 7, n, size) == stream[28:32]
    assert len(batch_indices(0, 0, 3, 8)) == 8  # a data set smaller than the batch


def test_curriculum():
    cfg = Config(cot_epochs=2, epochs_per_stage=1, final_epochs=3, batch_size=10, max_steps=3)
    assert curriculum(cfg, True, 100) == [(0, 20), (1, 10), (2, 10), (3, 40)]
    assert curriculum(cfg, False, 100) == [(0, 80)]
    cfg.max_iters = 8
    assert curriculum(cfg, True, 100) == [(0, 2), (1, 1), (2, 1), (3, 4)]


def run(script, *args):
    return subprocess.run([sys.executable, str(ROOT / script), *args], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("args, words", [
    (["--lr", "fast"], "--lr"), (["--learning_rate", "1"], "--learning_rate"), (["--method", "magic"], "--method"),
    (["--init", "nowhere"], "nowhere"), (["--stage", "rl", "--out_dir", "nowhere"], "nowhere"), (["--heads", "5"], "--heads"),
    (["--minibatch", "7"], "--minibatch"), (["--group", "1"], "--group"), (["--lr", "nan"], "--lr"), (["--lr", "-1"], "--lr"),
    (["--data", "nothing"], "nothing"), (["--stage", "vae", "--data", "gsm8k", "--data_dir", "nowhere"], "data.py gsm8k"),
    (["--batch_size", "0"], "--batch_size"), (["--latent_temperature", "0"], "--latent_temperature"),
    (["--max_steps", "256"], "--max_steps"), (["--method", "simcot", "--vae", "yes"], "--vae"),
    (["--method", "cot", "--decode", "yes"], "--decode"), (["--stage", "cot", "--method", "simcot"], "--stage cot"),
])
def test_user_errors_of_train(args, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        run_main(lambda: train(args))
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and err.count("\n") == 1 and err.startswith("error: "), err
    assert not list(tmp_path.iterdir())  # nothing written


def test_command_lines_really_exit_2(tmp_path):
    for script, args in (("train.py", ["--lr", "fast"]), ("eval.py", ["--ckpt", str(tmp_path)])):
        done = run(script, *args)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as e:
        parse(["--help"])
    said = capsys.readouterr().out
    assert e.value.code == 0
    from dataclasses import fields
    for f in fields(Config):
        assert f"--{f.name} " in said
    assert "[12.0; chain: 1.2; pretrained: 0.0]" in " ".join(said.split())
    check(Config())


def test_gradient_that_is_not_finite_stops_before_the_step(tmp_path, data):
    """The run ends with the step, the loss part and example ids; the last good checkpoint stands."""
    args = command(tmp_path, data, "--max_iters", "4", "--save_every", "1")
    import train as module
    real, calls = module.collate, []

    def poisoned(*a, **kw):
        batch = real(*a, **kw)
        calls.append(1)
        if len(calls) == 3:
            batch.token_weight = float("nan")
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "collate", poisoned)
        with pytest.raises(FloatingPointError, match=r"step 3: answer.*not finite.*questions.txt:"):
            train(args)
    assert find_checkpoint(tmp_path / "vae").name == "step-0000002"


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, vae, data, monkeypatch):
    import train as module
    real, said = module.supervised_step, []

    def step(*args):  # while this run goes on, another begins
        if not said:
            said.append(run("train.py", *command(tmp_path, data, "--max_iters", "2")))
        return real(*args)

    monkeypatch.setattr(module, "supervised_step", step)
    train(command(tmp_path, data, "--max_iters", "8"))
    assert said[0].returncode == 2 and said[0].stderr.startswith("error: ") and "another run" in said[0].stderr
    assert_same(weights(tmp_path, "vae"), weights(vae, "vae"), exact=True)
    train(command(tmp_path, data, "--max_iters", "2"))  # the folder is free again


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path, vae, data, number, monkeypatch):
    """The step is finished, the checkpoint written, the exit status 128 + signal; --resume needs no setting again."""
    import train as module
    real, before = module.supervised_step, signal.getsignal(number)

    def step(run, ddp, optimizer, examples, stage, step, lr):
        if step == 5:
            os.kill(os.getpid(), number)
        return real(run, ddp, optimizer, examples, stage, step, lr)

    with monkeypatch.context() as patch:
        patch.setattr(module, "supervised_step", step)
        with pytest.raises(SystemExit) as e:
            train(command(tmp_path, data, "--max_iters", "8"))
    assert e.value.code == 128 + number and signal.getsignal(number) is before
    assert find_checkpoint(tmp_path / "vae").name == "step-0000005"
    train(["--stage", "vae", "--resume", "--out_dir", str(tmp_path)])
    assert_same(weights(tmp_path, "vae"), weights(vae, "vae"), exact=True)


def test_resume_takes_the_divergence_from_the_same_start(tmp_path, vae, warm, rl, data, monkeypatch):
    """Wherever that is by now; nothing, or another checkpoint, in its place is refused."""
    import train as module
    shutil.copytree(warm / "vae", tmp_path / "vae")
    place, real = find_checkpoint(tmp_path / "vae"), module.end_step
    with monkeypatch.context() as patch:
        patch.setattr(module, "end_step", lambda run, *rest: setattr(run, "signal", signal.SIGINT) or real(run, *rest))
        with pytest.raises(SystemExit):
            train(command(tmp_path, data, "--max_iters", "3", stage="rl"))
    resume = ["--stage", "rl", "--resume", "--out_dir", str(tmp_path)]
    (tmp_path / "vae").rename(tmp_path / "moved")
    shutil.copytree(vae / "vae", tmp_path / "vae")
    with pytest.raises(FileNotFoundError, match=f"{place}: no such checkpoint; --kl_coef needs the one"):
        train(resume)
    find_checkpoint(tmp_path / "vae").rename(place)
    with pytest.raises(ValueError, match=f"{place} is not the checkpoint that this run began with"):
        train(resume)
    train([*resume, "--init", str(tmp_path / "moved")])
    assert_same(weights(tmp_path, "rl"), weights(rl, "rl"), exact=True)


def test_coherence_alone_needs_a_decoder(tmp_path, warm, data):
    flags = ["--init", str(warm), "--decode", "no", "--w_acc", "0", "--w_coh", "1"]
    with pytest.raises(ValueError, match="--w_acc 0 --w_coh 1.0: .* has no decoder"):
        train(command(tmp_path, data, *flags, stage="rl"))


def test_resume_refuses_to_become_another_run(vae, data):
    with pytest.raises(ValueError, match="--lr 0.5: --resume goes on with a run that has --lr"):
        train(command(vae, data, "--max_iters", "8", "--resume", "--lr", "0.5"))


def test_the_best_checkpoint_is_kept(tmp_path, data, monkeypatch):
    """The newest `keep`, and the best by validation, which the newest names."""
    import train as module
    accuracies = iter((0.1, 0.7, 0.2, 0.7, 0.3, 0.4, 0.5, 0.6))
    monkeypatch.setattr(module, "evaluate", lambda *_: ({"accuracy": next(accuracies)}, []))
    train(command(tmp_path, data, "--max_iters", "8", "--eval_every", "1", "--save_every", "1", "--keep", "1",
                  "--method", "nocot"))
    assert sorted(p.name for p in (tmp_path / "vae").glob("step-*")) == ["step-0000002", "step-0000008"]
    state = json.loads((tmp_path / "vae" / "step-0000008" / "train.json").read_text())
    assert state["best"] == {"step": 2, "accuracy": pytest.approx(0.7)}


@pytest.mark.parametrize("broken", ("save_tensors", "replace"))
def test_a_full_disk_is_one_line_and_earlier_checkpoints_stand(tmp_path, data, broken, monkeypatch, capsys):
    import train as module
    owner = module if broken == "save_tensors" else os
    real = getattr(owner, broken)

    def full(*args):
        if "0000002" in str(args[1]):
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(owner, broken, full)
    with pytest.raises(SystemExit) as e:
        run_main(lambda: train(command(tmp_path, data, "--max_iters", "4", "--save_every", "1")))
    said = capsys.readouterr().err
    assert e.value.code == 1 and said.count("\n") == 1 and "step-0000002" in said and "No space left" in said
    assert [p.name for p in (tmp_path / "vae").iterdir()].count("step-0000001") == 1
    assert not list((tmp_path / "vae").glob(".tmp-*"))
    assert find_checkpoint(tmp_path / "vae").name == "step-0000001"


@pytest.mark.parametrize("broken", ("disk", "folder"))
def test_metrics_that_cannot_be_written_are_one_line(tmp_path, broken, capsys):
    """A full disk says so only when the file is closed; a folder that somebody removed, when it is opened."""
    run = Run(Config(out_dir=str(tmp_path)), "vae")
    if broken == "disk":
        run.dir.mkdir()
        (run.dir / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as e:
        run_main(lambda: run.log(step=1))
    err = capsys.readouterr().err
    assert e.value.code == 1 and "metrics.jsonl could not be written (No s" in err and err.count("\n") == 1


def test_optimizer_state_is_loaded_to_the_parameters_device(tmp_path):
    """All of it: on a GPU fused AdamW wants its count of steps there too."""
    p = torch.nn.Parameter(torch.empty(2, 2, device="meta"))
    save_file({"step.p": torch.ones(1), "exp_avg.p": torch.ones(2, 2)}, tmp_path / "optimizer.safetensors")
    optimizer = torch.optim.AdamW([p])
    load_optimizer(optimizer, {p: "p"}, tmp_path)
    assert {v.device.type for v in optimizer.state[p].values()} == {"meta"} and optimizer.state[p]["step"].dim() == 0
