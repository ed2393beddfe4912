"""Evaluation: figures against hand counts, samples that depend on their question alone, tables of runs."""

import itertools
import json
import os
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace

import compare as comparison
import eval
import intervene as intervention
import oracle
import pytest
import torch
from compare import compare, gather
from data import Encoded, Example, cli, load
from eval import evaluate, evaluate_runs, find_checkpoint, judge, main, markdown, summary
from eval import cells as figures_of
from intervene import KINDS, intervene
from test_rl import Words
from test_train import SMALL
from train import main as train
from vae import METHODS, LatentReasoner, generator

TEXTS = {"72": [1, 2, 42], "24": [1, 3, 42], "24, without an end": [1, 3]}  # token ids of Words


def canned():
    """A model that answers question [1] greedily with 72, after a coherent plan of two steps, and [2, 3] with
    24, without an end and after a plan of one step that leads to 72. `samples` are its sampled answers."""
    model = oracle.tiny(c=2)
    greedy = {1: ["72"], 2: ["24, without an end"]}
    samples = {1: ["72", "24", "24", "24"], 2: ["24", "24", "72", "24"]}
    plan = ["<<48/2=24>>", "<<48+24=72>>"]
    model.plan_texts = lambda z, steps, words: [plan[2 - n:] for n in steps.tolist()]

    def rollout(questions, group=1, noise=None, max_tokens=16, temperature=1.0):
        model.asked = max_tokens, temperature
        answers = [TEXTS[text] for q in questions for text in (greedy if noise is None else samples)[q[0]]]
        tokens = torch.tensor([answer + [42] * (3 - len(answer)) for answer in answers])
        steps = torch.tensor([2 if q == [1] else 1 for q in questions for _ in range(group)])
        plan = SimpleNamespace(steps=steps, z=None)
        return SimpleNamespace(tokens=tokens, lengths=torch.tensor([*map(len, answers)]), plan=plan)

    model.rollout = rollout
    return model


@pytest.mark.parametrize("batch_size", (1, 128))
def test_figures_of_evaluate(batch_size):
    questions = [Encoded([2, 3], [], [], Example("b", (), "24", "b")),
                 Encoded([1], [], [], Example("a", ("<<48/2=24>>",), "72", "a"))]
    model = canned()
    figures, results = evaluate(model, Words(), questions, batch_size, samples=4, temperature=0.5)
    assert figures == pytest.approx({
        "n": 2, "accuracy": 1, "latents": (4 + 2) / 2, "tokens": (4 + 2 + 2 + 2) / 2,
        "coherence": (1 + 0) / 2, "pass@1": (1 + 3) / 8, "pass@2": (1 / 2 + 1) / 2, "pass@4": 1,
        "maj@4": (0 + 1) / 2})
    assert model.asked == (16, 0.5)
    assert [(r["id"], r["text"], r["tokens"]) for r in results] == [("b", "### 24", 4), ("a", "### 72", 6)]
    assert [r["plan"] for r in results] == [["<<48+24=72>>"], ["<<48/2=24>>", "<<48+24=72>>"]]
    assert evaluate(model, Words(), questions)[0] == {k: v for k, v in figures.items() if "@" not in k}
    none, _ = evaluate(model, Words(), [])  # a process may have no question of a small validation set
    assert none == {"n": 0, "accuracy": 0, "tokens": 0, "latents": 0, "coherence": 0}


def test_a_written_chain_may_fill_the_context():
    for method, most, wanted in (("cot", 160, 160), ("cot", 10**6, 2048), ("atp", 160, 16)):
        model, asked = oracle.tiny(method), []
        rollout = model.rollout

        def short(questions, max_tokens, rollout=rollout, asked=asked):
            asked.append(max_tokens)
            return rollout(questions, max_tokens=2)

        model.rollout = short
        evaluate(model, Sums(), oracle.examples(2), max_tokens=most)
        assert model.policy.config.max_position_embeddings == 2048 and asked == [wanted]


@pytest.mark.parametrize("n", (1, 4, 6))
def test_pass_at_k_counts_subsets(n):
    """pass@k is the share of subsets of k samples that have a right answer."""
    example = Example("q", (), "1", "q")
    for right in range(n + 1):
        texts = ["### 1"] * right + ["### 2"] * (n - right)
        found = judge(texts, example)
        assert list(found) == [f"pass@{k}" for k in (1, 2, 4, 6) if k <= n] + [f"maj@{n}"]
        for k in (1, 2, 4, 6)[:len(found) - 1]:
            subsets = list(itertools.combinations(texts, k))
            assert found[f"pass@{k}"] == pytest.approx(sum("### 1" in s for s in subsets) / len(subsets))
        assert right * 2 == n or found[f"maj@{n}"] == (right * 2 > n)
    assert judge(["no", "### 1", "no"], example)["maj@3"]  # who gives no answer has no vote
    assert not judge(["no", "no"], example)["maj@2"]


class Sums:
    """A tokenizer that makes an answer of any ids."""

    def decode(self, ids):
        return f"### {sum(ids) % 3}"


@pytest.mark.parametrize("method", ("atp", "simcot", "nocot"))
def test_samples_of_a_question_are_its_own(method):
    """They depend neither on the batch size nor on the other questions, but on seed and temperature."""
    model, questions = oracle.tiny(method), oracle.examples(12)
    sampled = lambda questions, *args, **more: [
        {k: v for k, v in r.items() if "@" in k}
        for r in evaluate(model, Sums(), questions, *args, samples=4, max_tokens=5, **more)[1]]
    whole = sampled(questions, 64)
    assert len({r["pass@1"] for r in whole}) > 2
    assert sampled(questions, 4) == whole and sampled(questions, 9) == whole
    assert sampled(questions[:5], 64) == whole[:5]
    equal = evaluate(model, Sums(), [questions[0]] * 8, samples=4, max_tokens=5)[1]
    assert len({r["pass@1"] for r in equal}) > 1  # no two questions share their noise
    assert sampled(questions, 64, seed=1) != whole and sampled(questions, 64, temperature=0.1) != whole


def fake_run(folder, seed=0, step=1, **state):
    ckpt = folder / f"step-{step:07d}"
    ckpt.mkdir(parents=True)
    state = {"config": {"method": "atp", "seed": seed}, "step": step, **state}
    (ckpt / "train.json").write_text(json.dumps(state))
    (ckpt / "latent.json").write_text("{}")
    return ckpt


def test_the_newest_checkpoint_was_saved_last_whatever_its_files_say(tmp_path, monkeypatch):
    """As train.json says: `cp -r` gives files the times, and the order, of the copying. In a run it is the
    latest step's."""
    first, last = fake_run(tmp_path / "z" / "vae", saved=1.5), fake_run(tmp_path / "a" / "rl", saved=2.5)
    late = fake_run(tmp_path / "a" / "rl", step=9, saved=2.0)  # resumed where the clock is behind
    for age, ckpt in enumerate((late, last, first)):  # the copying took the newest first
        os.utime(ckpt / "train.json", (age, age))
    assert find_checkpoint(tmp_path / "z") == first and find_checkpoint(tmp_path / "a") == late
    monkeypatch.chdir(last)
    assert find_checkpoint(".") == Path(".")
    for name in ("z", "a"):
        shutil.copytree(tmp_path / name, tmp_path / "copies" / name, copy_function=shutil.copyfile)
    assert find_checkpoint(tmp_path / "copies" / "a") == tmp_path / "copies/a/rl/step-0000009"
    both = tmp_path / "both"
    for ckpt in (first, late):
        shutil.copytree(ckpt.parent, both / ckpt.parent.name)
    assert find_checkpoint(both).parent.name == "rl"
    old = fake_run(both / "zz")  # of a version that did not say when: older than those that do
    assert find_checkpoint(both).parent.name == "rl"
    shutil.rmtree(both / "rl"), shutil.rmtree(both / "vae")
    assert find_checkpoint(both) == old
    assert find_checkpoint(fake_run(both / "zzz").parents[1]).parent.name == "zzz"  # a tie: by name


@pytest.mark.parametrize("change", ({"saved": "now"}, {"step": None}, {"config": {"method": "x", "seed": 0}},
                                    {"config": {"method": "atp", "seed": 0, "max_answer": 0}},
                                    {"config": {"method": "atp", "seed": 0, "max_answer": "24"}}))
def test_what_train_json_must_say(tmp_path, change):
    fake_run(tmp_path / "good")
    ckpt = fake_run(tmp_path / "broken", **{"step": 1} | {k: v for k, v in change.items() if k != "step"})
    if "step" in change:
        (ckpt / "train.json").write_text(json.dumps({"config": {"method": "atp", "seed": 0}}))
    with pytest.raises(ValueError, match="broken/step-0000001/train.json: "):
        find_checkpoint(tmp_path)


def test_rows_are_folders_without_their_seeds(tmp_path, monkeypatch):
    for seed in (0, 1, 10):
        for name in ("vae", "rl1", "b10_x"):
            fake_run(tmp_path / f"few_{seed}" / name, seed)
    fake_run(tmp_path / "few_1" / "deep" / "rl", 1)
    monkeypatch.chdir(tmp_path)
    folders = ["few_0", tmp_path / "few_1", "few_10/../few_10", "few_1/deep"]
    assert {row: list(seeds) for row, seeds in gather(folders).items()} == {
        "few_*/b10_x": [0, 1, 10], "few_*/rl1": [0, 1, 10], "few_*/vae": [0, 1, 10], "few_*/deep/rl": [1]}
    assert list(gather(["few_1"])) == ["b10_x", "rl*", "vae"]  # what all paths share is left out
    assert list(gather(["few_1/vae"])) == ["vae"]
    fake_run(tmp_path / "width_10" / "vae", 0)
    assert list(gather(["width_10", "few_0/vae"])) == ["width_10/vae", "few_*/vae"]
    assert gather(["few_0", "few_1", "few_1/vae"]) == gather(["few_0", "few_1"])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        gather(["few_0", "nowhere"])


def run(*accuracies, **figures):
    """{test set: figures} of the sets a and b."""
    figures = {"n": 10, "tokens": 4.0, "latents": 2.0, "coherence": 0.5, **figures}
    return {name: {**figures, "accuracy": accuracy} for name, accuracy in zip("ab", accuracies)}


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_of_models():
    runs = {"x": run(0.2, 0.6), "y": run(0.3, 0.4, tokens=5.125)}
    table = markdown({label: summary([figures]) for label, figures in runs.items()})
    head, rule, *rows = table.splitlines()
    assert cells(head) == ["", "a", "b", "mean", "tokens", "coherence %"]
    assert cells(rule) == ["---"] + 5 * ["---:"]
    assert list(map(cells, rows)) == [["x", "20.0", "60.0", "40.0", "4.00", "50.0"],
                                      ["y", "30.0", "40.0", "35.0", "5.12", "50.0"]]
    head, *_ = markdown({"x": summary([run(0.2)])}, "out/rl").splitlines()
    assert cells(head) == ["out/rl", "a", "tokens", "coherence %"]  # the mean of one set would say it twice


def test_runs_are_compared_over_seeds_and_paired_by_seed():
    """Mean ± deviation over seeds. Rows with seeds 2, 0, 1 and 0, 1, 2, 7 are compared over 0, 1 and 2."""
    base = {s: {"benchmarks": run(0.2 + s / 10, 0.5)} for s in (0, 1, 2, 7)}
    better = {s: {"benchmarks": run(0.4 + s / 10, 0.5 + s / 10, tokens=4.0 + s)} for s in (2, 0, 1)}
    single = {1: {"benchmarks": run(0.1, 0.5)}}
    apart = {9: {"benchmarks": run(0.1, 0.5)}}
    rows = {"base": base, "better": better, "single": single, "apart": apart}
    head, _, *lines = compare(rows, "base", ["tokens"]).splitlines()
    assert cells(head) == ["", "a", "b", "mean", "to base", "tokens"]
    lines = {cells(line)[0]: dict(zip(cells(head), cells(line))) for line in lines}
    gains = [100 * (0.2 + s / 10) / 2 for s in range(3)]
    error = statistics.stdev(gains) / 3**0.5
    assert lines["better"]["to base"] == f"+{statistics.mean(gains):.1f} ± {error:.1f}" == "+15.0 ± 2.9"
    assert lines["better"]["a"] == "50.0 ± 10.0" and lines["better"]["tokens"] == "5.00 ± 1.00"
    assert lines["base"]["to base"] == lines["apart"]["to base"] == ""
    assert lines["single"]["to base"] == "-10.0" and lines["single"]["a"] == "10.0"
    assert figures_of([{"accuracy": 0.5, "n": 7}], ["accuracy", "n"]) == {"accuracy %": "50.0", "n": "7"}


# --- interventions on latents ---

LATENT_METHODS = [method for method, parts in METHODS.items() if parts["latent"]]


def uneven(method):
    """A model whose plans have unlike lengths, if it has a stop head."""
    model = oracle.tiny(method, seed=3).eval()
    if model.stop_head is not None:
        torch.nn.init.normal_(model.stop_head[-1].weight, std=2.0)
    return model


@pytest.mark.parametrize("method", LATENT_METHODS)
def test_an_answer_to_a_given_plan(method):
    """To the rollout's own plan it is the rollout's, to another plan the oracle's."""
    model, questions = uneven(method), [e.question for e in oracle.examples(9)]
    rollout = model.rollout(questions)
    z, steps = rollout.plan.z, rollout.plan.steps
    assert method != "atp" or len(set(steps.tolist())) > 1
    for given, n in ((z, steps), (z.flip(0), steps.flip(0)), (z, 0 * steps)):
        with torch.no_grad():
            tokens, lengths = intervention.answer(model, rollout.prefix, given, n, 16)
        if given is z and n is steps:
            assert torch.equal(tokens, rollout.tokens) and torch.equal(lengths, rollout.lengths)
        for b, question in enumerate(questions):
            sequence = oracle.embed(model.policy, question + [oracle.START])
            sequence += [*given[b, :n[b]].flatten(0, 1), *oracle.embed(model.policy, [oracle.END])]
            for token in tokens[b, :lengths[b]].tolist():
                logits = model.policy.logits(oracle.read(model.policy, sequence))[:43]
                assert int(logits.argmax()) == token
                sequence += oracle.embed(model.policy, [token])


@pytest.mark.parametrize("method", LATENT_METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_becomes_of_answers_under_another_plan(method, kind, monkeypatch):
    """Each row is answered from the latents that the kind of intervention says, by definition; the figures
    are counted by hand, and the right answer's log-probability is the oracle's."""
    model, questions, asked = uneven(method), oracle.examples(12), []
    answer = intervention.answer

    def spy(model, prefix, z, steps, most):
        asked.append((z, steps, answer(model, prefix, z, steps, most)))
        return asked[-1][2]

    monkeypatch.setattr(intervention, "answer", spy)
    found = intervene(model, Sums(), questions, generator(0), max_tokens=5, kinds=[kind])
    rollout = model.rollout([e.question for e in questions], max_tokens=5)
    plan, [(z, steps, given)] = rollout.plan, asked
    text_of = lambda row, length: f"### {sum(row[:length - (row[length - 1] == 42)]) % 3}"
    own = [text_of(*each) for each in zip(rollout.tokens.tolist(), rollout.lengths.tolist())]
    texts = [text_of(*each) for each in zip(*(t.tolist() for t in given))]
    n, counted = plan.steps.tolist(), {}
    for b, k in enumerate(n):
        donors = [o % 12 for o in range(b + 1, b + 12) if n[o % 12] == k and own[o % 12] != own[b]]
        assert steps[b] == (0 if kind == "none" else k)
        if kind == "zero":
            assert not z[b].any()
        if kind == "noise":
            assert torch.allclose(z[b, :k].norm(dim=-1), plan.z[b, :k].norm(dim=-1), rtol=1e-4)
            assert not k or not torch.allclose(z[b, :k], plan.z[b, :k])
        if kind == "reverse":
            assert torch.equal(z[b, :k], plan.z[b, :k].flip(0))
        if kind == "other" and donors:
            assert torch.equal(z[b, :k], plan.z[donors[0], :k])
        if kind != "other" or donors:
            after, before = (log_prob(model, questions[b], x) for x in (z[b, :steps[b]], plan.z[b, :k]))
            counted[b] = {"before": own[b] == "### 1", "after": texts[b] == "### 1",
                          "changed": texts[b] != own[b], "gain": pytest.approx(after - before, abs=1e-4),
                          "follows": kind == "other" and texts[b] == own[donors[0]]}
    assert counted and found == {kind: counted}
    assert kind != "other" or method != "atp" or len(counted) < 12  # some questions have no partner


@torch.no_grad()
def log_prob(model, question, latents):
    """log p of the right answer after the latents (n, c, d)."""
    sequence = oracle.embed(model.policy, question.question + [oracle.START])
    sequence += [*latents.flatten(0, 1), *oracle.embed(model.policy, [oracle.END])]
    return -float(oracle.negative_log_likelihood(model.policy, sequence, question.answer, oracle.read))


def test_the_row_of_an_intervention():
    figures = [{"before": True, "after": False, "changed": True, "follows": True, "gain": -1.5},
               {"before": True, "after": True, "changed": False, "follows": False, "gain": 0.25}]
    assert [*intervention.row("other", figures).values()] == ["2", "100.0", "50.0", "50.0", "50.0", "-0.62"]
    assert [*intervention.row("zero", figures).values()] == ["2", "100.0", "50.0", "50.0", "", "-0.62"]
    assert [*intervention.row("other", []).values()] == ["0", "", "", "", "", ""]


# --- the command line ---

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    file = out / "questions.txt"
    lines = [f"Ann has {i} pens and {i % 3 + 1} more. How many?||<<{i}+{i % 3 + 1}={i + i % 3 + 1}>> #### "
             f"{i + i % 3 + 1}\n" for i in range(1, 20)]
    file.write_text("".join(lines))
    for seed in "01":
        flags = [*SMALL, "--data", str(file), "--seed", seed, "--out_dir", str(out / f"out_{seed}")]
        train([*flags, "--stage", "vae", "--max_iters", "2"])
        train([*flags, "--stage", "rl", "--max_iters", "1"])
    return out


def test_one_checkpoint_from_the_command_line(runs, capsys):
    """A row a test set and their mean; questions explained; the figures are those of the JSON file."""
    file, data = runs / "one.json", str(runs / "questions.txt")
    main(["--ckpt", str(runs / "out_0" / "rl"), "--data", data, "easy", "--limit", "3", "--samples", "2",
          "--explain", "1", "--json", str(file)])
    said = capsys.readouterr().out
    head, _, *rows = [line for line in said.splitlines() if line.startswith("|")]
    ckpt = str(runs / "out_0" / "rl" / "step-0000001")
    assert cells(head) == [ckpt, "n", "accuracy %", "tokens", "latents", "coherence %", "pass@1 %",
                           "pass@2 %", "maj@2 %"]
    assert [cells(row)[0] for row in rows] == [data, "easy", "mean"]
    found = json.loads(file.read_text())
    for row, name in zip(rows, (data, "easy")):
        figures = found["benchmarks"][name]
        assert cells(row)[1:4] == ["3", f"{100 * figures['accuracy']:.1f}", f"{figures['tokens']:.2f}"]
    [explained] = found["explained"][data]
    assert explained["steps"] == ["<<1+2=3>>"] and "reference: <<1+2=3>>" in said
    assert explained["question"] in said and explained["text"] in said


def test_the_table_of_a_training_run(runs, capsys):
    data = str(runs / "questions.txt")
    rows = [("one", runs / "out_0" / "vae"), ("two", runs / "out_0" / "rl")]
    evaluate_runs(rows, [data, "easy"], "test", "data", "cpu", "float32", "no")
    head, _, *lines = map(cells, capsys.readouterr().out.splitlines())
    assert head == ["", data, "easy", "mean", "tokens", "coherence %"]
    assert [line[0] for line in lines] == ["one", "two"]
    sets = {name: load(name, "test") for name in (data, "easy")}
    for line, (_, run) in zip(lines, rows):
        figures = eval.measure(run, sets)["benchmarks"]
        assert line[1] == f"{100 * figures[data]['accuracy']:.1f}"
        assert line[4] == f"{(figures[data]['tokens'] + figures['easy']['tokens']) / 2:.2f}"


@pytest.mark.parametrize("most", (24, 3, None))  # None: a checkpoint of an older version, which had 16
def test_an_answer_may_be_as_long_as_in_training(runs, tmp_path, monkeypatch, most):
    ckpt, asked, rollout = tmp_path / "step-0000001", [], LatentReasoner.rollout
    shutil.copytree(find_checkpoint(runs / "out_0" / "rl"), ckpt)
    state = json.loads((ckpt / "train.json").read_text())
    state["config"] |= {"max_answer": most}
    if most is None:
        del state["config"]["max_answer"]
    (ckpt / "train.json").write_text(json.dumps(state))

    def spy(self, questions, group=1, noise=None, max_tokens=16, temperature=1.0):
        asked.append((max_tokens, noise and noise.answer.shape[1]))
        return rollout(self, questions, group, noise, max_tokens, temperature)

    monkeypatch.setattr(LatentReasoner, "rollout", spy)
    main(["--ckpt", str(ckpt), "--data", str(runs / "questions.txt"), "--limit", "2", "--samples", "2"])
    assert asked == [(most or 16, None), (most or 16, most or 16)]


def test_a_path_may_begin_with_the_home_folder(runs, monkeypatch):
    monkeypatch.setenv("HOME", str(runs))
    flags = ["--data", str(runs / "questions.txt"), "--limit", "1", "--json", "~/home.json"]
    main(["--ckpt", "~/out_0/rl", *flags])
    assert json.loads((runs / "home.json").read_text())["checkpoint"].startswith(str(runs / "out_0"))
    comparison.main(["~/out_0", "--baseline", "~/out_0/rl", *flags])
    assert [r["row"] for r in json.loads((runs / "home.json").read_text())] == ["rl", "vae"]


def test_only_latents_can_be_exchanged(runs, tmp_path, capsys):
    """All kinds, a row each; the accuracy before is eval.py's."""
    data = ["--data", str(runs / "questions.txt"), "easy", "--limit", "6"]
    ckpt = find_checkpoint(runs / "out_0" / "vae")
    intervention.main(["--ckpt", str(ckpt.parent), *data, "--batch_size", "5"])
    head, _, *rows = map(cells, capsys.readouterr().out.splitlines())
    assert head[0] == str(ckpt) and [row[0] for row in rows] == list(KINDS)
    accuracy = [figures["accuracy"] for figures in eval.measure(ckpt, {
        name: load(name, "test")[:6] for name in data[1:3]})["benchmarks"].values()]
    for row in rows:
        assert row[0] == "other" or row[1:3] == ["12", f"{100 * statistics.mean(accuracy):.1f}"]
    capsys.readouterr()
    intervention.main(["--ckpt", str(ckpt), *data, "--kinds", "none"])
    assert capsys.readouterr().out.splitlines()[2:] == ["| " + " | ".join(rows[-1]) + " |"]
    shutil.copytree(ckpt, tmp_path / "step-0000001")
    file = tmp_path / "step-0000001" / "latent.json"
    parts = {"method": "cot", **dict.fromkeys(["latent", "head", "vae", "stop", "decode"], False)}
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))
    with pytest.raises(ValueError, match="step-0000001 does not think in latents"):
        intervention.main(["--ckpt", str(tmp_path), *data])


def test_compare_from_the_command_line(runs, capsys):
    """All runs in the folders, the row of a baseline, and all figures in the JSON file."""
    folders, file = [str(runs / "out_0"), str(runs / "out_1")], runs / "all.json"
    data = ["--data", str(runs / "questions.txt"), "--limit", "6", "--samples", "2"]
    comparison.main([*folders, "--baseline", str(runs / "out_1" / "vae"), "--json", str(file), *data])
    said = capsys.readouterr().out.splitlines()
    head, _, *rows = [cells(line) for line in said if line.startswith("|")]
    measured = [os.path.relpath(runs / f"out_{seed}" / "rl" / "step-0000001") for seed in "01"]
    assert f"out_*/rl: {' '.join(measured)}" in said
    assert head == ["", data[1], "to out_*/vae", "tokens", "latents", "coherence %", "pass@1 %", "pass@2 %",
                    "maj@2 %"]
    assert [row[0] for row in rows] == ["out_*/rl", "out_*/vae"] and rows[1][2] == "" != rows[0][2]
    found = json.loads(file.read_text())
    assert [(r["row"], r["config"]["seed"]) for r in found] == [
        ("out_*/rl", 0), ("out_*/rl", 1), ("out_*/vae", 0), ("out_*/vae", 1)]
    assert all(r["benchmarks"][data[1]]["n"] == 6 for r in found)
    tokens = [r["benchmarks"][data[1]]["tokens"] for r in found[:2]]
    assert rows[0][3] == f"{statistics.mean(tokens):.2f} ± {statistics.stdev(tokens):.2f}"
    with pytest.raises(ValueError, match="--baseline .*vae: not one of the runs"):
        comparison.main([folders[0], "--baseline", str(runs / "out_1" / "vae"), *data])


@pytest.mark.parametrize("args, words", [
    (["--baseline", "x"], "--baseline"), (["--ckpt", "empty"], "empty: no checkpoint there"),
    (["--device", "gpu"], "--device"), (["--device", "cuda"], "--device cuda: this torch sees no GPU"),
    (["--dtype", "float16"], "--dtype"), (["--json", "nowhere/x.json"], "'nowhere/x.json'"),
    (["--data", "nothing"], "no dataset and no file 'nothing'"),
    (["--data", "long.txt"], "long.txt: none of its questions fits"), (["--seed", "-1"], "--seed -1"),
    (["--samples", "-1"], "--samples -1"), (["--batch_size", "-1"], "--batch_size -1"),
    (["--temperature", "-1"], "--temperature -1"), (["--temperature", "nan"], "--temperature nan")])
def test_user_errors_of_eval(args, words, runs, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "long.txt").write_text(f"Ann has {'1 and ' * 400}2 pens.||<<1+2=3>> #### 3")
    args = [arg.format(runs=runs) for arg in ["--ckpt", str(runs / "out_0"), *args]]
    with pytest.raises(SystemExit) as e:
        cli(lambda: main(args))
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and err.count("\n") == 1 and err.startswith("error: "), err


def test_plot(runs, tmp_path):
    pytest.importorskip("matplotlib")
    from plot import draw
    comparison.main([str(runs / "out_0"), "--data", str(runs / "questions.txt"),
          "--json", str(tmp_path / "runs.json")])
    draw(json.loads((tmp_path / "runs.json").read_text())).savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_samples_at_temperature_0_differ_by_their_latents_alone(runs, tmp_path, monkeypatch):
    """In a method without VAE and stop head, all are the greedy answer."""
    file = str(runs / "questions.txt")
    train([*SMALL, "--data", file, "--out_dir", str(tmp_path), "--stage", "vae", "--max_iters", "2",
           "--method", "simcot"])
    greedy, share = {}, {}
    monkeypatch.setattr(eval, "is_correct", lambda text, example: greedy.setdefault(example.id, text) == text)
    for temperature in ("0", "1"):
        main(["--ckpt", str(tmp_path), "--data", file, "--samples", "4", "--temperature", temperature,
              "--json", str(tmp_path / "x.json")])
        [figures] = json.loads((tmp_path / "x.json").read_text())["benchmarks"].values()
        assert figures["accuracy"] == 1
        share[temperature] = figures["pass@1"]
    assert share["0"] == 1 > share["1"]
