"""Evaluate a checkpoint: accuracy, tokens, coherence, pass@k, plans in words.

    python eval.py --ckpt out/rl --data gsm8k svamp --samples 8 --explain 5 --json results.json
"""

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

STEP_FOLDER = "step-" + 7 * "[0-9]"  # checkpoints in a run's folder
DIGITS = {"n": 0, "tokens": 2, "latents": 2}  # in tables. Others are in per cent


def checkpoints(path):
    """The newest checkpoint, by step, of each run in `path`: a checkpoint, a run or a folder of runs."""
    path, levels = Path(path).expanduser(), (".", STEP_FOLDER, f"*/{STEP_FOLDER}")
    found = sorted(file for level in levels for file in path.glob(f"{level}/train.json"))
    if not found:
        raise FileNotFoundError(f"{path}: no checkpoint there (no step-*/train.json; run train.py)")
    return [*{file.resolve().parents[1]: file.parent for file in found}.values()]  # the last of a run stays


def find_checkpoint(path):
    """The checkpoint in `path` that was saved last. train.json says when: a copied file has a new date."""
    return max(checkpoints(path), key=lambda ckpt: (read_state(ckpt).get("saved", 0.0), ckpt))


def read_state(ckpt):
    """train.json of a checkpoint."""
    match state := read_json(Path(ckpt) / "train.json"):
        case {"step": int(), "config": {"seed": int(), "method": str(method)} as config} if method in METHODS:
            if type(state.get("saved", 0.0)) is float and config.get("max_answer", 16) in range(1, 2**20):
                return state
    raise ValueError(f"{ckpt}/train.json: step, saved, or config's seed, method or max_answer is wrong")


def judge(texts, example):
    """Figures of n sampled answers. pass@k: P(one of k samples is right), an unbiased estimate (arXiv
    2107.03374). maj@n: is the most frequent answer right?"""
    n, right = len(texts), sum(is_correct(text, example) for text in texts)
    sizes = sorted({n, *(2**i for i in range(n.bit_length()))})  # 1, 2, 4, ... and n
    votes = Counter(filter(None, map(extract_answer, texts))).most_common(1)
    majority = any(is_correct(f"### {answer}", example) for answer, _ in votes)
    return {f"pass@{k}": 1 - comb(n - right, k) / comb(n, k) for k in sizes} | {f"maj@{n}": majority}


@torch.no_grad()
def evaluate(model, tokenizer, encoded, batch_size=0, samples=0, seed=0, max_tokens=160, temperature=1.0,
             max_answer=16, bf16=False, progress=None):
    """Answer data.Encoded questions greedily, then by `samples` rollouts each. Returns means over questions
    and a dict for each: its example, plan (in words), text and figures (rl.coherence, `judge`).
    tokens: latents and written tokens but <eos>. max_answer: most tokens that a latent method writes,
    max_tokens: others. progress: label of a bar."""
    config, policy, results = model.eval().config, model.policy.config, [{}] * len(encoded)
    limit = min(max_answer if config.latent else max_tokens, policy.max_position_embeddings)
    rows = batch_size or (128 if model.device.type == "cpu" else 512)
    size = max(1, rows // max(1, samples))  # questions in a pass
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].question))  # less padding
    for at in tqdm(range(0, len(order), size), progress, leave=False, disable=None if progress else True):
        part, d = order[at:at + size], policy.hidden_size
        questions = [encoded[i].question for i in part]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            rollout = model.rollout(questions, max_tokens=limit)
            plan = rollout.plan
            plans = model.plan_texts(plan.z, plan.steps, tokenizer) if model.decoder else [[]] * len(part)
            texts, ended = model.texts(rollout.tokens, rollout.lengths, tokenizer)
            if samples:  # with noise that no other question or batch size changes
                noise = [Noise.draw(samples, config, d, limit, generator(seed, i)) for i in part]
                noise = Noise(*map(torch.cat, zip(*noise)))
                drawn = model.rollout(questions, samples, noise, limit, temperature)
                sampled, _ = model.texts(drawn.tokens, drawn.lengths, tokenizer)
        latents = (plan.steps * config.thoughts_per_step).tolist()
        found = zip(part, plans, texts, latents, rollout.lengths.tolist(), ended)
        for j, (i, words, text, n, length, end) in enumerate(found):
            example = encoded[i].example
            results[i] = vars(example) | dict(
                plan=words, text=text, accuracy=is_correct(text, example), latents=n, tokens=n + length - end,
                coherence=coherence(words, extract_answer(text)))
            if samples:
                results[i] |= judge(sampled[j * samples:(j + 1) * samples], example)
    names = ["accuracy", "tokens", "latents", "coherence", *(n for r in results[:1] for n in r if "@" in n)]
    means = {name: sum(r[name] for r in results) / max(1, len(results)) for name in names}
    return {"n": len(results), **means}, results


def with_mean(run):
    """A run's figures, {test set: {name: number}}. Of several sets, their mean is the last."""
    means = {name: mean(figures[name] for figures in run.values()) for name in [*run.values()][0]}
    return {**run, "mean": means} if len(run) > 1 else run


def cells(figures, names):
    """{column: text} of a list of figures: mean, of several ± standard deviation."""
    row = {}
    for name in names:
        column, scale, digits = (name, 1, DIGITS[name]) if name in DIGITS else (f"{name} %", 100, 1)
        values = [scale * each[name] for each in figures]
        row[column] = " ± ".join(f"{f(values):.{digits}f}" for f in (mean, stdev)[:len(values)])
    return row


def summary(runs, names=("tokens", "coherence")):
    """The row of some runs: accuracy on each test set, then means over the sets of `names`."""
    runs = [with_mean(run) for run in runs]
    accuracy = {name: cells([run[name] for run in runs], ["accuracy"])["accuracy %"] for name in runs[0]}
    return accuracy | cells([[*run.values()][-1] for run in runs], names)


def markdown(rows, title=""):
    """A table of {label: {column: text}}."""
    head, body = [title, *[*rows.values()][0]], [[label, *row.values()] for label, row in rows.items()]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measure(path, data, device="auto", dtype="auto", compile="auto", explain=0, **options):
    """Evaluate path's newest checkpoint on {test set: examples}, and print `explain` questions of each.
    options: of evaluate. Returns train.json with figures and what was printed."""
    ckpt, device = find_checkpoint(path), device_of(device)
    on = ["yes", "bfloat16"] + ["auto"] * (device.type == "cuda")
    model, tokenizer = LatentReasoner.from_pretrained(ckpt, device=device), Tokenizer.from_pretrained(ckpt)
    record = dict(checkpoint=str(ckpt), **read_state(ckpt), benchmarks={}, explained={})
    options.update(max_answer=int(record["config"].get("max_answer", 16)), bf16=dtype in on)
    for llama in model.llamas() if compile in on else ():
        llama.compile_blocks()
    for name, examples in data.items():
        encoded, skipped = encode_all(examples, tokenizer, model.policy.config.max_position_embeddings)
        if not encoded:
            raise ValueError(f"{name}: none of its questions fits the context of {ckpt}")
        if skipped:
            print(f"{name}: {skipped} questions do not fit the context")
        record["benchmarks"][name], results = evaluate(model, tokenizer, encoded, progress=name, **options)
        record["explained"][name] = shown = results[:explain]
        for r in shown:
            print(f"{r['id']}: {r['question']}")
            for step, reference in zip_longest(r["plan"], r["steps"], fillvalue=""):
                print(f"  {step:<20} reference: {reference}")
            print(f"  {r['text']:<20} reference: {r['answer']} ({'right' if r['accuracy'] else 'wrong'})\n")
    return record


def evaluate_runs(rows, sets, split, data_dir, *options):
    """Print a table of [(label, run's folder)]. options: device, dtype, compile."""
    data = {name: load(name, split, data_dir) for name in sets}
    print(markdown({label: summary([measure(run, data, *options)["benchmarks"]]) for label, run in rows}))


def parser():
    p = Parser(description="Evaluate checkpoints (defaults in brackets).")
    add = p.add_argument
    add("--data", nargs="+", default=TEST_SETS, help=f"test sets or files {TEST_SETS}")
    add("--data_dir", default="data", help="folder of published files (data)")
    add("--split", default="test", choices=["test", "valid", "train"], help="of each (test)")
    add("--limit", type=int, default=0, help="questions of each (0: all)")
    add("--samples", type=int, default=0, help="rollouts a question: pass@k, maj@k")
    add("--temperature", type=float, default=1.0, help="of sampled answers (1; 0: greedy)")
    add("--batch_size", type=int, default=0, help="rollouts a pass (0: 128, on a GPU 512)")
    add("--max_tokens", type=int, default=160, help="of a written chain (160)")
    add("--explain", type=int, default=0, help="questions of each to print")
    add("--seed", type=int, default=0, help="of the samples")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: a GPU if any")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: bfloat16 on a GPU")
    add("--compile", default="auto", choices=["auto", "yes", "no"], help="auto: on a GPU")
    add("--json", type=expanduser, default="", help="file for figures")
    return p


def read_sets(flags):
    """{test set: examples} that flags (a dict) ask for; these flags are taken out."""
    for name, value in flags.items():
        least = int(name == "max_tokens")
        if type(value) in (int, float) and not least <= value < 2**32:
            raise ValueError(f"--{name} {value}: must be from {least} to 2^32 - 1")
    names, limit, *where = map(flags.pop, ("data", "limit", "split", "data_dir"))
    return {name: load(name, *where)[:limit or None] for name in names}


def main(argv=None):
    p = parser()
    p.add_argument("--ckpt", default="out", help="checkpoint, run or folder of runs: its newest (out)")
    flags = vars(p.parse_args(argv))
    ckpt, file = map(flags.pop, ("ckpt", "json"))
    if file:
        open(file, "a").close()  # fails now, not after the work
    record = measure(ckpt, read_sets(flags), **flags)
    rows = {name: cells([run], run) for name, run in with_mean(record["benchmarks"]).items()}
    print(markdown(rows, record["checkpoint"]))
    if file:
        write_json(file, record)


if __name__ == "__main__":
    cli(main)
