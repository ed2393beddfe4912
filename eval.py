"""Evaluate checkpoints: accuracy, tokens, coherence, pass@k, maj@k, plans in words; compare runs.

    python eval.py                                 newest checkpoint below out/, built-in test sets
    python eval.py --ckpt out/rl --data gsm8k svamp --samples 8 --explain 5 --json results.json
    python eval.py --compare out_0 out_1 out_2     all runs in these folders, over their seeds
"""

import json
import os
import re
import sys
from collections import Counter
from itertools import zip_longest
from math import comb
from pathlib import Path
from statistics import mean, stdev

import torch
from tqdm import tqdm

from data import TEST_SETS, Parser, Tokenizer, cli, encode_all, extract_answer, is_correct, load
from model import write_json
from rl import coherence
from vae import (LatentReasoner, Noise, check_vocabulary, checkpoints, device_of, find_checkpoint, generator,
                 read_state)


def judge_samples(texts, example):
    """pass@k (unbiased: Chen et al., arXiv 2107.03374) and maj@n of n sampled answers."""
    n, right = len(texts), sum(is_correct(text, example) for text in texts)
    sizes = [2**i for i in range(n.bit_length()) if 2**i < n] + [n]
    result = {f"pass@{k}": 1 - comb(n - right, k) / comb(n, k) for k in sizes}
    votes = Counter(filter(None, map(extract_answer, texts))).most_common(1)
    return {**result, f"maj@{n}": bool(votes) and is_correct(f"### {votes[0][0]}", example)}


@torch.no_grad()
def evaluate(model, tokenizer, encoded, batch_size=128, samples=0, seed=0, max_tokens=160, temperature=1.0,
             latent_temperature=1.0, bf16=False, progress=None):
    """Figures of a list of data.Encoded questions, and what became of each (a list of dicts).

    Figures are means over questions: accuracy and coherence (0 to 1), latents, tokens (latents and answer
    tokens without <eos>); of `samples` rollouts a question pass@k and maj@k. progress: a tqdm of questions."""
    model.eval()
    config, policy = model.config, model.policy.config
    # a latent method writes only its short answer
    limit = 16 if config.latent else min(max_tokens, policy.max_position_embeddings)
    # questions of like length share a batch, which leaves little padding
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].question))
    size = max(1, batch_size // max(1, samples))
    results = [None] * len(encoded)
    for part in (order[at:at + size] for at in range(0, len(order), size)):
        questions = [encoded[i].question for i in part]
        plans = [[]] * len(part)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            rollout = model.rollout(questions, max_tokens=limit)
            if model.decoder is not None:
                plans = model.plan_texts(rollout.z, rollout.steps, tokenizer)
            if samples:
                # a question has its own noise: no batch size and no other question changes its samples
                noise = Noise.cat([Noise.draw(samples, config, policy.hidden_size, limit, generator(seed, i))
                                   for i in part])
                sampled = model.rollout(questions, samples, noise, limit, temperature, latent_temperature)
                sampled, _ = model.answer_texts(sampled, tokenizer)
        texts, ended = model.answer_texts(rollout, tokenizer)
        latents = (rollout.steps * config.thoughts_per_step).tolist()
        lengths = rollout.lengths.tolist()
        for j, i in enumerate(part):
            example, text, plan = encoded[i].example, texts[j], plans[j]
            results[i] = {**vars(example), "plan": plan, "text": text, "accuracy": is_correct(text, example),
                          "tokens": latents[j] + lengths[j] - ended[j], "latents": latents[j],
                          "coherence": coherence(plan, extract_answer(text))}
            if samples:
                results[i] |= judge_samples(sampled[j * samples:(j + 1) * samples], example)
        if progress is not None:
            progress.update(len(part))
    names = ["accuracy", "tokens", "latents", "coherence"]
    names += [name for name in results[0] if "@" in name] if samples else []
    return {"n": len(results)} | {k: sum(r[k] for r in results) / max(1, len(results)) for k in names}, results


def mean_figures(run):
    """The mean over test sets of {test set: figures}, as the paper reports it; n is the sum."""
    sets = list(run.values())
    return {k: sum(f[k] for f in sets) / (1 if k == "n" else len(sets)) for k in sets[0]}


def cell(name, runs):
    """A figure as text: mean over runs ± standard deviation, of differences ± standard error; shares in per cent."""
    scale, digits = {"n": (1, 0), "tokens": (1, 2), "latents": (1, 2)}.get(name, (100, 1))
    values = [scale * figures[name] for figures in runs if name in figures]
    sign = "+" if name.startswith("to ") else ""
    error = stdev(values) / (len(values)**0.5 if sign else 1) if len(values) > 1 else None
    text = f"{mean(values):{sign}.{digits}f}" if values else ""
    return text if error is None else f"{text} ± {error:.{digits}f}"


def table(rows, names=("tokens", "coherence")):
    """Markdown of [(label, run, ...)], a run {test set: figures}: accuracy on each set, their mean, then the
    means of figures `names`. Several runs, one a seed, give mean ± standard deviation."""
    lines = []
    for label, *runs in rows:
        cells = {name: cell("accuracy", [run[name] for run in runs]) for name in runs[0]}
        means = [mean_figures(run) for run in runs]
        if len(cells) > 1:
            cells["mean"] = cell("accuracy", means)
        lines.append([label, *cells.values(), *(cell(name, means) for name in names)])
    head = ["", *cells, *(f"{n} %" if n == "coherence" or "@" in n else n for n in names)]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(file, results):
    """Draw accuracy against tokens, a point a run, and the curves of RL runs; a colour a row."""
    from matplotlib.figure import Figure
    figure, colors = Figure(figsize=(16, 4), layout="constrained"), {}
    names = ("reward", "accuracy", "coherence")
    first, *others = figure.subplots(1, 4)
    first.set(title="accuracy", xlabel="tokens")
    for (row, _), result in results.items():
        color = colors.setdefault(row, f"C{len(colors)}")
        means = mean_figures(result["benchmarks"])
        first.plot(means["tokens"], means["accuracy"], "o", color=color, label=row)
        file = Path(result["checkpoint"]).parent / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if "reward" in line]
        for axis, name in zip(others, names):
            axis.set(title=name, xlabel="RL step")
            axis.plot([line["step"] for line in lines], [line[name] for line in lines], color=color)
    first.legend()
    figure.savefig(file)


def gather(folders):
    """{(row, seed): checkpoint} of all runs in the folders. A row is named by its runs' folders, with a * for
    the seed: few_0/vae and few_1/vae are few_*/vae. ValueError where a row has a seed twice."""
    runs, found = {}, [ckpt.resolve() for folder in folders for ckpt in checkpoints(folder)]
    root = os.path.commonpath([ckpt.parents[1] for ckpt in found])
    for ckpt in found:
        seed = read_state(ckpt)["config"]["seed"]
        row = re.sub(rf"(?<!\d){seed}(?![0-9a-zA-Z])", "*", os.path.relpath(ckpt.parent, root), count=1)
        if (row, seed) in runs:
            raise ValueError(f"--compare: {runs[row, seed]} and {ckpt} are both seed {seed} of {row}")
        runs[row, seed] = ckpt
    return runs


def explain(result):
    """Print a question, each latent step in words beside the reference step, and the answer."""
    print(f"{result['id']}: {result['question']}")
    for k, (step, reference) in enumerate(zip_longest(result["plan"], result["steps"], fillvalue=""), 1):
        print(f"  step {k}: {step:<16} reference: {reference}")
    verdict = "right" if result["accuracy"] else "wrong"
    print(f"  {result['text']!r} ({verdict}, reference {result['answer']})\n")


def measure(ckpt, data, args):
    """What --json writes of a checkpoint, evaluated on {test set: examples}."""
    device = device_of(args.device)
    gpu = device.type == "cuda"
    model, tokenizer = LatentReasoner.from_pretrained(ckpt, device=device), Tokenizer.from_pretrained(ckpt)
    check_vocabulary(tokenizer, model.policy, ckpt)
    if args.compile == "yes" or (args.compile == "auto" and gpu):
        model.compile_blocks()
    bf16 = args.dtype == "bfloat16" or (args.dtype == "auto" and gpu)
    figures, explained = {}, {}
    for name, examples in data.items():
        encoded, skipped = encode_all(examples, tokenizer, model.policy.config.max_position_embeddings)
        if skipped:
            print(f"{name}: {skipped} questions do not fit the context", file=sys.stderr)
        if not encoded:
            raise ValueError(f"{name}: none of its questions fits the context of {ckpt}")
        with tqdm(total=len(encoded), desc=name, disable=None, leave=False) as bar:
            figures[name], results = evaluate(
                model, tokenizer, encoded, args.batch_size, args.samples, args.seed, args.max_tokens,
                args.temperature, args.latent_temperature, bf16, bar)
        explained[name] = results[:args.explain]
    return {"checkpoint": str(ckpt), "config": read_state(ckpt)["config"], "benchmarks": figures,
            "explained": explained}


FLAGS = {  # name: default, or choices of which it is the first; help
    "ckpt": ("", "checkpoint, run, or folder of runs: the newest in it (out)"),
    "data_dir": ("data", "where data.py put the published files"),
    "split": (("test", "valid", "train"), "of each set"),
    "limit": (0, "most questions of each set (0: all)"),
    "samples": (0, "rollouts a question, for pass@k and maj@k"),
    "temperature": (1.0, "of the samples' answer tokens (0: greedy)"),
    "latent_temperature": (1.0, "of the samples' latents: times sigma"),
    "batch_size": (128, "rollouts in one pass"),
    "max_tokens": (160, "longest written chain of thought"),
    "explain": (0, "questions of each set to print, plans in words"),
    "seed": (0, "of the samples"),
    "device": (("auto", "cpu", "cuda"), "auto: a GPU if there is one"),
    "dtype": (("auto", "float32", "bfloat16"), "autocast; auto: bfloat16 on a GPU"),
    "compile": (("auto", "yes", "no"), "torch.compile; auto: on a GPU"),
    "json": ("", "file for configuration, figures, explained questions"),
    "baseline": ("", "run of the row that others are compared with (the first)"),
    "plot": ("", "file for a picture: accuracy, tokens, RL curves (needs matplotlib)"),
}


def parse(argv):
    p = Parser(description=__doc__.split("\n")[0])
    p.add_argument("--data", nargs="+", default=TEST_SETS, help=f"sets or files [{' '.join(TEST_SETS)}]")
    p.add_argument("--compare", nargs="+", metavar="DIR", help="a table of all runs in these folders")
    for name, (default, text) in FLAGS.items():
        choices = default if isinstance(default, tuple) else None
        default = choices[0] if choices else default
        p.add_argument(f"--{name}", type=type(default), choices=choices, default=default, help=f"{text} [{default}]")
    args = p.parse_args(argv)
    for name, value in vars(args).items():
        least = 1 if name in ("batch_size", "max_tokens") else 0
        if isinstance(value, (int, float)) and not least <= value < 2**32:
            raise ValueError(f"--{name} {value}: must be from {least} to 2^32 - 1")
    if args.compare and args.ckpt:
        raise ValueError("--ckpt goes without --compare")
    return args


def main(argv=None):
    args = parse(argv)
    data = {name: load(name, args.split, args.data_dir)[:args.limit or None] for name in args.data}
    runs = gather(args.compare or [find_checkpoint(args.ckpt or "out")])
    start = find_checkpoint(args.baseline or next(iter(runs.values()))).resolve()
    base = [row for (row, _), ckpt in runs.items() if ckpt == start]
    if not base:
        raise ValueError(f"--baseline {args.baseline}: not one of the runs that --compare names")
    if args.plot:
        plot(args.plot, {})  # tells now, not after the work, what is wrong
    results = {key: measure(ckpt, data, args) for key, ckpt in runs.items()}
    rows = {row: [] for row, _ in runs}
    for (row, seed), result in results.items():
        rows[row].append(result["benchmarks"])
        for name, figures in result["benchmarks"].items() if row != base[0] and (base[0], seed) in runs else ():
            figures[f"to {base[0]}"] = figures["accuracy"] - results[base[0], seed]["benchmarks"][name]["accuracy"]
        ...
    
    if args.json:
        write_json(args.json, list(results.values()) if args.compare else results[0])


if __name__ == "__main__":
    cli(main)
