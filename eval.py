"""Evaluate a checkpoint: accuracy, tokens, coherence, pass@k, plans in words.

    python eval.py --ckpt out/rl --data gsm8k svamp --samples 8 --explain 5 --json results.json
"""

from argparse import ArgumentDefaultsHelpFormatter
from collections import Counter
from itertools import zip_longest
from math import comb
from os.path import expanduser
from pathlib import Path
from statistics import mean, stdev

import torch
from tqdm import tqdm

from data import TEST_SETS, Parser, Tokenizer, cli, encode_all, extract_answer, is_correct, load
from model import read_json, write_json
from rl import coherence
from vae import METHODS, LatentReasoner, Noise, device_of, generator

STEP_FOLDER = "step-" + 7 * "[0-9]"  # names of checkpoints in a run's folder
KINDS = ("zero", "noise", "other", "reverse", "none")
COUNTS = {"n": 0, "tokens": 2, "latents": 2}  # figure: digits shown. Other figures are shares, in per cent


def checkpoints(path):
    """The newest checkpoint, by its step, of each run in `path`: a checkpoint, a run or a folder of runs."""
    path, levels = Path(path).expanduser(), ("", f"{STEP_FOLDER}/", f"*/{STEP_FOLDER}/")
    found = [file for level in levels for file in path.glob(f"{level}train.json")]
    if not found:
        raise FileNotFoundError(f"{path}: no checkpoint there (no step-*/train.json: run `python train.py`)")
    runs = {file.resolve().parents[1]: file.parent for file in sorted(found)}  # the last of a run stays
    return list(runs.values())


def find_checkpoint(path):
    """The checkpoint in `path` that was saved last. train.json says when: a copied file has a new date."""
    return max(checkpoints(path), key=lambda ckpt: (read_state(ckpt).get("saved", 0.0), ckpt))


def read_state(ckpt):
    """train.json of a checkpoint."""
    match state := read_json(Path(ckpt) / "train.json"):
        case {"step": int(), "config": {"seed": int(), "method": str(method)} as config} if method in METHODS:
            if type(state.get("saved", 0.0)) is float and config.get("max_answer", 16) in range(1, 2**20):
                return state
    raise ValueError(f"{ckpt}/train.json: 'step', or 'config' with its 'seed' and 'method', is missing")


def judge(texts, example):
    """Figures of n sampled answers. pass@k: the probability that one of k samples is right, its unbiased
    estimate (arXiv 2107.03374). maj@n: whether the most frequent answer is right."""
    n, right = len(texts), sum(is_correct(text, example) for text in texts)
    sizes = sorted({min(2**i, n) for i in range(n.bit_length() + 1)})  # 1, 2, 4, ... and n
    figures = {f"pass@{k}": 1 - comb(n - right, k) / comb(n, k) for k in sizes}
    votes = Counter(filter(None, map(extract_answer, texts))).most_common(1)
    return figures | {f"maj@{n}": bool(votes) and is_correct(f"### {votes[0][0]}", example)}


def change_plan(kind, plan, donors, seed):
    """Latents in the place of a plan's: (z, steps). zero. noise, as long as each latent. other: those of the
    rows `donors`. reverse: the steps in reverse order. none: no step, <|end-latent|> at once."""
    z, steps = plan.z, plan.steps
    if kind == "noise":
        noise = torch.randn(z.shape, generator=generator(seed)).to(z)
        return noise * (z.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)), steps
    if kind == "reverse":
        order = (steps[:, None] - 1 - torch.arange(z.shape[1], device=z.device)).clamp(min=0)
        return z.take_along_dim(order[:, :, None, None], dim=1), steps
    return (z[donors], steps) if kind == "other" else (0 * z, 0 * steps if kind == "none" else steps)


def intervene(model, tokenizer, kind, seed, rollout, answers, questions, limit):
    """Figures of each question after another plan. changed: the answer is another. follows: it is that of the
    donor, the next question in the batch of as many steps and another answer."""
    n, rows = rollout.plan.steps.tolist(), [*range(len(answers))]
    fits = lambda b, o: n[o] == n[b] and answers[o] not in (answers[b], None)
    donors = [next((o for o in rows[b + 1:] + rows[:b] if fits(b, o)), b) for b in rows]
    z, steps = change_plan(kind, rollout.plan, donors, seed)
    texts, _ = model.texts(*model.answer(rollout.prefix, z, steps, limit), tokenizer)
    found = [{"exchanged": kind != "other" or donors[b] != b} for b in rows]
    for b in (b for b in rows if found[b]["exchanged"]):  # the others have no donor
        answer = extract_answer(texts[b])
        found[b] |= {f"{kind}: accuracy": is_correct(texts[b], questions[b].example),
                     f"{kind}: changed": answer != answers[b]}
        found[b] |= {"other: follows": answer == answers[donors[b]]} if kind == "other" else {}
    return found


def answer_greedily(model, tokenizer, questions, limit, kind, seed):
    """The result (see `evaluate`) of each data.Encoded question."""
    rollout, plans = model.rollout([e.question for e in questions], max_tokens=limit), [[]] * len(questions)
    if model.decoder is not None:
        plans = model.plan_texts(rollout.plan.z, rollout.plan.steps, tokenizer)
    texts, ended = model.texts(rollout.tokens, rollout.lengths, tokenizer)
    latents = (rollout.plan.steps * model.config.thoughts_per_step).tolist()
    written = [length - end for length, end in zip(rollout.lengths.tolist(), ended)]  # without <eos>
    answers, changed = [extract_answer(text) for text in texts], [{}] * len(questions)
    if kind:
        changed = intervene(model, tokenizer, kind, seed, rollout, answers, questions, limit)
    return [vars(e.example) | dict(plan=plan, text=text, accuracy=is_correct(text, e.example), latents=n,
                                   tokens=n + w, coherence=coherence(plan, answer)) | figures
            for e, plan, text, answer, n, w, figures in zip(
                questions, plans, texts, answers, latents, written, changed)]


@torch.no_grad()
def evaluate(model, tokenizer, encoded, batch_size=0, samples=0, seed=0, max_tokens=160, temperature=1.0,
             intervene="", max_answer=16, bf16=False, progress=None):
    """Answer data.Encoded questions greedily, then by `samples` rollouts each. Returns means over questions,
    and a dict for each question: its example, plan (in words), text and figures.
    accuracy: is the greedy answer right? latents: their number. tokens: latents and written tokens without
    <eos>. coherence: share of plan steps whose result is used (rl.coherence). pass@k, maj@k: see `judge`.
    intervene: see `change_plan`; figures of the exchanged are means over these alone.
    max_answer: most tokens that a latent method writes, max_tokens: others. progress: label of a bar."""
    config, policy, results = model.eval().config, model.policy.config, [{}] * len(encoded)
    limit = min(max_answer if config.latent else max_tokens, policy.max_position_embeddings)
    batch_size = batch_size or (128 if model.device.type == "cpu" else 512)
    size = max(1, batch_size // max(1, samples))  # questions in a pass
    # questions of like length share a pass: less padding
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].question))
    for at in tqdm(range(0, len(order), size), progress, leave=False, disable=None if progress else True):
        part, d = order[at:at + size], policy.hidden_size
        questions = [encoded[i] for i in part]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            answered = answer_greedily(model, tokenizer, questions, limit, intervene, seed)
            if samples:  # with noise that no other question and no batch size changes
                noise = [Noise.draw(samples, config, d, limit, generator(seed, i)) for i in part]
                noise = Noise(*map(torch.cat, zip(*noise)))
                rollout = model.rollout([e.question for e in questions], samples, noise, limit, temperature)
                texts, _ = model.texts(rollout.tokens, rollout.lengths, tokenizer)
        for j, i in enumerate(part):
            results[i] = answered[j]
            if samples:
                results[i] |= judge(texts[j * samples:(j + 1) * samples], encoded[i].example)
    names = ["accuracy", "tokens", "latents", "coherence", *(n for r in results[:1] for n in r if "@" in n)]
    if intervene:
        names += ["exchanged", f"{intervene}: accuracy", f"{intervene}: changed"]
        names += ["other: follows"] if intervene == "other" else []
    values = {name: [r[name] for r in results if name in r] for name in names}
    return {"n": len(results)} | {n: sum(each) / max(1, len(each)) for n, each in values.items()}, results


# --- tables. The figures of a run: {test set: {name: number}} ---

def over_sets(run):
    """The mean over the test sets, as the paper reports it."""
    return {name: mean(figures[name] for figures in run.values()) for name in [*run.values()][0]}


def with_mean(run):
    return run | ({"mean": over_sets(run)} if len(run) > 1 else {})  # of one set it would say the same


def cells(figures, names):
    """{column: text} of a list of figures: the mean, ± the standard deviation where there are several."""
    row = {}
    for name in names:
        column, scale, digits = (name, 1, COUNTS[name]) if name in COUNTS else (f"{name} %", 100, 1)
        values = [scale * each[name] for each in figures]
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        row[column] = f"{mean(values):.{digits}f}{spread}"
    return row


def summary(runs, names=("tokens", "coherence")):
    """The row of some runs: accuracy on each test set, then means over the sets: accuracy and `names`."""
    runs, means = [with_mean(run) for run in runs], [over_sets(run) for run in runs]
    accuracy = {name: cells([run[name] for run in runs], ["accuracy"])["accuracy %"] for name in runs[0]}
    return accuracy | cells(means, names)


def markdown(rows, title=""):
    """A table of {label: {column: text}}."""
    columns, body = [*rows.values()][0], [[label, *row.values()] for label, row in rows.items()]
    lines = [[title, *columns], ["---"] + ["---:"] * len(columns), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- checkpoints measured ---

def measure(path, data, device="auto", dtype="auto", compile="auto", explain=0, **options):
    """Evaluate path's newest checkpoint on {test set: examples}, and print `explain` questions of each.
    options: evaluate's. Returns a record: train.json, the figures of each set, what was printed."""
    ckpt, device = find_checkpoint(path), device_of(device)
    on = {"auto": device.type == "cuda", "yes": True, "bfloat16": True}
    model, tokenizer = LatentReasoner.from_pretrained(ckpt, device=device), Tokenizer.from_pretrained(ckpt)
    record = {"checkpoint": str(ckpt), **read_state(ckpt), "benchmarks": {}, "explained": {}}
    options |= {"max_answer": int(record["config"].get("max_answer", 16)), "bf16": on.get(dtype, False)}
    if options.get("intervene") and not model.config.latent:
        raise ValueError(f"--intervene {options['intervene']}: {ckpt} does not think in latents")
    for llama in model.llamas() if on.get(compile) else ():
        llama.compile_blocks()
    for name, examples in data.items():
        encoded, skipped = encode_all(examples, tokenizer, model.policy.config.max_position_embeddings)
        if not encoded:
            raise ValueError(f"{name}: none of its questions fits the context of {ckpt}")
        if skipped:
            print(f"{name}: {skipped} questions do not fit the context")
        record["benchmarks"][name], results = evaluate(model, tokenizer, encoded, progress=name, **options)
        record["explained"][name] = results[:explain]
        for r in results[:explain]:
            print(f"{r['id']}: {r['question']}")
            for step, reference in zip_longest(r["plan"], r["steps"], fillvalue=""):
                print(f"  {step:<20} reference: {reference}")
            print(f"  {r['text']:<20} reference: {r['answer']} ({'right' if r['accuracy'] else 'wrong'})\n")
    return record


def evaluate_runs(rows, sets, split, data_dir, device, dtype, compile):
    """Print a table of [(label, run's folder)]."""
    data = {name: load(name, split, data_dir) for name in sets}
    records = {label: measure(run, data, device, dtype, compile) for label, run in rows}
    print(markdown({label: summary([record["benchmarks"]]) for label, record in records.items()}))


def parser():
    p = Parser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--data", nargs="+", default=TEST_SETS, help="test sets or files")
    add("--data_dir", default="data", help="folder of the published files")
    add("--split", default="test", choices=["test", "valid", "train"], help="of each set")
    add("--limit", type=int, default=0, help="questions of each set (0: all)")
    add("--samples", type=int, default=0, help="rollouts a question for pass@k and maj@k")
    add("--temperature", type=float, default=1.0, help="of sampled answers (0: greedy)")
    add("--batch_size", type=int, default=0, help="rollouts in one pass (0: 128, on a GPU 512)")
    add("--max_tokens", type=int, default=160, help="of a written chain of thought")
    add("--explain", type=int, default=0, help="questions of each set to print, with plans")
    add("--intervene", default="", choices=KINDS, help="answer from these latents in the plan's place too")
    add("--seed", type=int, default=0, help="of the samples, and of noise")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: a GPU if there is one")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: bfloat16 on a GPU")
    add("--compile", default="auto", choices=["auto", "yes", "no"], help="auto: on a GPU")
    add("--json", type=expanduser, default="", help="file for configuration and figures")
    return p


def read_sets(flags):
    """{test set: examples} that a dict of flags asks for; the flags that say so are taken out of it."""
    for name, value in flags.items():
        least = int(name == "max_tokens")
        if type(value) in (int, float) and not least <= value < 2**32:
            raise ValueError(f"--{name} {value}: must be from {least} to 2^32 - 1")
    names, limit, *where = map(flags.pop, ("data", "limit", "split", "data_dir"))
    return {name: load(name, *where)[:limit or None] for name in names}


def main(argv=None):
    p = parser()
    p.add_argument("--ckpt", default="out", help="checkpoint, run, or folder of runs: the newest")
    flags = vars(p.parse_args(argv))
    ckpt, file = flags.pop("ckpt"), flags.pop("json")
    if file:
        open(file, "a").close()  # what cannot be written fails now, not after the work
    record = measure(ckpt, read_sets(flags), **flags)
    sets = with_mean(record["benchmarks"])
    print(markdown({name: cells([figures], figures) for name, figures in sets.items()}, record["checkpoint"]))
    if file:
        write_json(file, record)


if __name__ == "__main__":
    cli(main)
