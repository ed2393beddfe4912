"""Runs compared: groups over seeds, paired differences, the table, the picture."""

import dataclasses
import json
import shutil
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import eval
import pytest
import torch
from data import Encoded, Example
from eval import ASIDE, PLANNING, Result, checkpoints, comparison, difference, grouped, main, run_main
from test_rl import Words
from test_train import SMALL
from train import Config
from train import main as train
from vae import LatentConfig


def result(name, seed, right, stage=6, **config):
    """A Result of two sets, `right` their lists of answers that are right."""
    sets = {"a": right[0], "b": right[1]}
    figures = {s: {"n": len(r), "accuracy": sum(r) / len(r), "tokens": 4.0 + seed, "latents": 2.0, "coherence": 0.5}
               for s, r in sets.items()}
    answered = {s: [{"id": f"{s}:{i}", "correct": bool(c)} for i, c in enumerate(r)] for s, r in sets.items()}
    config = {"method": "atp", "seed": seed, "out_dir": name, "init": name, "lr": 1e-3, "w_coh": 0.1, **config}
    return Result(Path(name), {"config": config, "stage": stage, "step": 1}, figures, answered)


def rows(n, *right):
    return [[i < r for i in range(n)] for r in right]


def test_runs_are_grouped_by_configuration_and_labelled_by_what_differs():
    groups = grouped([result("a", 0, rows(4, 1, 2)), result("b", 0, rows(4, 1, 2), stage="rl"),
                      result("c", 1, rows(4, 1, 2)), result("d", 0, rows(4, 1, 2), stage="rl", w_coh=0.0),
                      result("e", 0, rows(4, 1, 2), method="simcot"), result("f", 0, rows(4, 1, 2), vae="no"),
                      result("g", 2, rows(4, 1, 2), w_coh=0.0)])
    assert [(g.label, [str(r.ckpt) for r in g.results]) for g in groups] == [
        ("atp", ["a", "c", "g"]), ("atp + rl", ["b"]), ("atp + rl, w_coh 0.0", ["d"]), ("simcot", ["e"]),
        ("atp, vae no", ["f"])]


def test_what_is_set_aside_is_named_as_in_config():
    names = [f.name for f in dataclasses.fields(Config)]
    assert PLANNING == set(names[names.index("rl_lr"):names.index("eval_every")]) and ASIDE < set(names) - PLANNING


def test_one_seed_twice_is_refused():
    with pytest.raises(ValueError, match="x and y are runs of one configuration and one seed"):
        grouped([result("x", 3, rows(4, 1, 2)), result("y", 3, rows(4, 1, 2))])


def test_difference_over_seeds_is_paired_by_seed():
    base = [result(f"s{s}", s, rows(10, 2 + s, 5)) for s in range(3)]
    better = [result(f"b{s}", s, rows(10, 4 + s, 5 + s), stage="rl") for s in (2, 0, 1)]
    sft, rl = grouped(base + better)
    gains = [(0.2 + s / 10) / 2 for s in range(3)]
    mean, error = difference(rl, sft)
    assert mean == pytest.approx(statistics.mean(gains)) and error == pytest.approx(statistics.stdev(gains) / 3**0.5)
    assert difference(rl, sft) == pytest.approx(tuple(x * y for x, y in zip(difference(sft, rl), (-1, 1))))
    [other] = grouped([result("o", 9, rows(10, 1, 1))])
    assert difference(other, sft) is None
    assert "| s0" not in comparison([sft, rl], sft) and "+15.0 ± 2.9" in comparison([sft, rl], sft)


def test_difference_of_one_seed_has_the_error_of_its_paired_questions():
    """Equal questions cancel: the error is that of the mean of what differs, not of two samples."""
    torch.manual_seed(0)
    old = [torch.rand(500) < 0.5, torch.rand(500) < 0.3]
    new = [r ^ (torch.rand(500) < 0.04) for r in old]
    sft, rl = grouped([result("a", 0, [r.tolist() for r in old]), result("b", 0, [r.tolist() for r in new], stage="rl")])
    change = [n.double() - o.double() for n, o in zip(new, old)]
    mean, error = difference(rl, sft)
    assert mean == pytest.approx(float(sum(c.mean() for c in change)) / 2)
    assert error == pytest.approx(float(sum(c.var() / 500 for c in change)) ** 0.5 / 2) and error < 0.01


def test_table_has_mean_and_deviation_over_seeds():
    [group] = grouped([result("a", 0, rows(10, 2, 6)), result("b", 1, rows(10, 4, 6))])
    head, _, row = comparison([group], group).splitlines()
    assert [c.strip() for c in head.split("|")[1:-1]] == ["", "seeds", "a", "b", "mean", "to atp", "tokens", "latents", "coherence"]
    assert [c.strip() for c in row.split("|")[1:-1]] == [
        "atp", "2", "30.0 ± 14.1", "60.0 ± 0.0", "45.0 ± 7.1", "", "4.50 ± 0.71", "2.00 ± 0.00", "50.0 ± 0.0"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    file = out / "questions.txt"
    file.write_text("".join(f"Ann has {i} pens and {i % 3 + 1} more. How many?||<<{i}+{i % 3 + 1}={i + i % 3 + 1}>> "
                            f"#### {i + i % 3 + 1}\n" for i in range(1, 20)))
    for seed in "01":
        flags = [*SMALL, "--data", str(file), "--seed", seed, "--out_dir", str(out / f"out_{seed}")]
        train([*flags, "--stage", "vae", "--max_iters", "2"])
        train([*flags, "--stage", "rl", "--max_iters", "1"])
    return out


def test_compare_from_the_command_line(runs, capsys):
    """Every run in the folders named, the row of a baseline, and all figures in the JSON file."""
    folders, file = [str(runs / "out_0"), str(runs / "out_1")], runs / "all.json"
    data = ["--data", str(runs / "questions.txt"), "--limit", "6", "--samples", "2"]
    main(["--compare", *folders, "--baseline", str(runs / "out_1" / "vae"), "--json", str(file), *data])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2].startswith("| atp + rl | 2 |") and lines[3].startswith("| atp | 2 |")
    assert "to atp " in lines[0] and "pass@2" in lines[0] and "maj@2" in lines[0]
    found = json.loads(file.read_text())
    assert [(r["label"], r["seed"]) for r in found] == [("atp + rl", 0), ("atp + rl", 1), ("atp", 0), ("atp", 1)]
    assert all(r["benchmarks"][data[1]]["n"] == 6 for r in found)
    assert [c.parent.name for c in checkpoints(runs / "out_0")] == ["rl", "vae"]
    with pytest.raises(ValueError, match="--baseline .*vae: not one of the runs that --compare names"):
        main(["--compare", folders[0], "--baseline", str(runs / "out_1" / "vae"), *data])


CKPT = "a checkpoint"


@pytest.mark.parametrize("args, words", [
    (["--baseline", "x"], "--baseline and --plot go with --compare"), (["--compare", "x", "--explain", "1"], "--explain go without"),
    (["--device", "gpu"], "--device"), (["--seed", "-1"], "--seed"), (["--json", "nowhere/x.json"], "--json nowhere/x.json: no such"),
    (["--json", "."], "--json .: that is a folder"), (["--ckpt", ""], ": no checkpoint there"), (["--samples", "20000"], "--samples"),
    (["--data", "long.txt", "--ckpt", CKPT], "none of its questions fits"), (["--temperature", "-1"], "--temperature"), (["--latent_temperature", "nan"], "--latent_temperature")])
def test_user_errors_of_eval(args, words, runs, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "long.txt").write_text(f"Ann has {'1 and ' * 400}2 pens.||<<1+2=3>> #### 3")
    args = [str(runs / "out_0") if a == CKPT else a for a in args]
    with pytest.raises(SystemExit) as e:
        run_main(lambda: main(args))
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and err.count("\n") == 1 and err.startswith("error: "), err


def test_plot_without_matplotlib(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="--plot needs matplotlib, which is not installed"):
        main(["--compare", str(runs / "out_0"), "--plot", "x.png"])


def test_plot(runs, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    args = ["--compare", str(runs / "out_0"), "--data", str(runs / "questions.txt"), "--plot"]
    main([*args, str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="--plot .*x.zzz: its name must end in .*png"):
        main(["--compare", "nothing", "--plot", str(tmp_path / "x.zzz")])
    copy = shutil.copytree(runs / "out_0", tmp_path / "copy")
    with open(copy / "rl" / "metrics.jsonl", "a") as f:
        f.write("{\n")
    with pytest.raises(ValueError, match="metrics.jsonl:4: not a line of metrics"):
        main(["--compare", str(copy), *args[2:], str(tmp_path / "y.png")])


class Canned:
    """A model that answers question [1] greedily with 72, by a coherent plan of two steps, and in samples with 72, 24, 24,
    24; question [2, 3] with 24, without an end and by a plan that leads to 72, and in samples with 24, 24, 72, 24."""

    config = LatentConfig("atp", True, True, True, True, True, thoughts_per_step=2, max_steps=3, start_id=8, end_id=9, eos_id=0)
    policy, decoder = SimpleNamespace(config=SimpleNamespace(hidden_size=4)), object()
    right, wrong = [1, 2, 0], [1, 3, 0]

    def eval(self):
        return self

    def decode_steps(self, z, steps):
        return [[[4], [5]][2 - int(n):] for n in steps]

    def rollout(self, questions, group=1, noise=None, max_tokens=16, temperature=1.0, latent_temperature=1.0):
        self.asked = temperature, latent_temperature
        first, second = ([self.right], [[1, 3]]) if noise is None else (
            [self.right] + 3 * [self.wrong], [self.wrong, self.wrong, self.right, self.wrong])
        tokens = [row for q in questions for row in (first if q == [1] else second)]
        return SimpleNamespace(tokens=torch.tensor([t + [0] * (3 - len(t)) for t in tokens]), group=group, z=None,
                               lengths=torch.tensor([len(t) for t in tokens]),
                               steps=torch.tensor([2 if q == [1] else 1 for q in questions]))


def test_figures_of_evaluate():
    questions = [Encoded([2, 3], [], [], Example("b", (), "24", "b")), Encoded([1], [], [], Example("a", (), "72", "a"))]
    model = Canned()
    figures, answered = eval.evaluate(model, Words(), questions, samples=4, temperature=0.5, latent_temperature=3.0)
    assert figures == pytest.approx({
        "n": 2, "accuracy": 1, "latents": (4 + 2) / 2, "tokens": (4 + 2 + 2 + 2) / 2, "coherence": (1 + 0) / 2,
        "pass@1": (1 + 3) / 8, "pass@2": (1 / 2 + 1) / 2, "pass@4": 1, "maj@4": (0 + 1) / 2})
    assert model.asked == (0.5, 3.0) and [e["id"] for e in answered] == ["b", "a"]
    assert [e["plan"] for e in answered] == [["<<48+24=72>>"], ["<<48/2=24>>", "<<48+24=72>>"]]


def test_samples_at_temperature_0_differ_by_their_latents_alone(runs, tmp_path, monkeypatch):
    """In a method without VAE and stop head, all are the greedy answer."""
    file = str(runs / "questions.txt")
    train([*SMALL, "--data", file, "--out_dir", str(tmp_path), "--stage", "vae", "--max_iters", "2", "--method", "simcot"])
    greedy = {}
    monkeypatch.setattr(eval, "is_correct", lambda text, example: greedy.setdefault(example.id, text) == text)
    share = {}
    for temperature in ("0", "1"):
        main(["--ckpt", str(tmp_path), "--data", file, "--samples", "4", "--temperature", temperature,
              "--json", str(tmp_path / "x.json")])
        [figures] = json.loads((tmp_path / "x.json").read_text())["benchmarks"].values()
        assert figures["accuracy"] == 1
        share[temperature] = figures["pass@1"]
    assert share["0"] == 1 > share["1"]
