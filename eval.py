"""Evaluate a checkpoint: accuracy, tokens, coherence, pass@k, plans in words.

    python eval.py --ckpt out/rl --data gsm8k svamp --samples 8 --explain 5 --json results.json
"""

from collections import Counter
from itertools import zip_longest
from math import comb
from statistics import mean, stdev

import torch
from tqdm import tqdm

from data import TEST_SETS, Parser, Tokenizer, cli, encode_all, extract_answer, is_correct, load
from model import write_json
from rl import coherence
from vae import LatentReasoner, Noise, device_of, find_checkpoint, generator, read_state


def judge(texts, example):
    """pass@k (unbiased, arXiv 2107.03374) and maj@n of n sampled answers."""
    n, right = len(texts), sum(is_correct(text, example) for text in texts)
    sizes = sorted({min(2**i, n) for i in range(n.bit_length() + 1)})
    figures = {f"pass@{k}": 1 - comb(n - right, k) / comb(n, k) for k in sizes}
    votes = Counter(filter(None, map(extract_answer, texts))).most_common(1)
    return figures | {f"maj@{n}": bool(votes) and is_correct(f"### {votes[0][0]}", example)}


@torch.no_grad()
def evaluate(model, tokenizer, encoded, batch_size=0, samples=0, seed=0, max_tokens=160, temperature=1.0,
             bf16=False, progress=None, max_answer=16):
    """Mean figures of data.Encoded questions, and what became of each (a list of dicts): accuracy and
    coherence (0 to 1), latents, tokens (latents and answer tokens without <eos>), pass@k and maj@k of
    `samples` rollouts each. progress: label of a bar."""
    config, policy, results = model.eval().config, model.policy.config, [{}] * len(encoded)
    # a latent method writes only its short answer
    limit = max_answer if config.latent else min(max_tokens, policy.max_position_embeddings)
    # questions of like length share a batch: less padding
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].question))
    batch_size = batch_size or (128 if model.device.type == "cpu" else 512)
    size, d = max(1, batch_size // max(1, samples)), policy.hidden_size
    for at in tqdm(range(0, len(order), size), progress, leave=False, disable=None if progress else True):
        part = order[at:at + size]
        questions, plans = [encoded[i].question for i in part], [[]] * len(part)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            rollout = model.rollout(questions, max_tokens=limit)
            if model.decoder is not None:
                plans = model.plan_texts(rollout.plan.z, rollout.plan.steps, tokenizer)
            if samples:  # with noise that no other question and no batch size changes
                noise = [Noise.draw(samples, config, d, limit, generator(seed, i)) for i in part]
                noise = Noise(*map(torch.cat, zip(*noise)))
                sampled = model.rollout(questions, samples, noise, limit, temperature)
                sampled, _ = model.texts(sampled.tokens, sampled.lengths, tokenizer)
        texts, ended = model.texts(rollout.tokens, rollout.lengths, tokenizer)
        latents = (rollout.plan.steps * config.thoughts_per_step).tolist()
        lengths = rollout.lengths.tolist()
        for j, i in enumerate(part):
            plan, text, example = plans[j], texts[j], encoded[i].example
            results[i] = vars(example) | dict(
                plan=plan, text=text, accuracy=is_correct(text, example), latents=latents[j],
                tokens=latents[j] + lengths[j] - ended[j], coherence=coherence(plan, extract_answer(text)))
            if samples:
                results[i] |= judge(sampled[j * samples:(j + 1) * samples], example)
    names = ["accuracy", "tokens", "latents", "coherence", *(n for r in results[:1] for n in r if "@" in n)]
    means = {name: sum(r[name] for r in results) / max(1, len(results)) for name in names}
    return {"n": len(results)} | means, results


def over_sets(run):
    """The mean over the sets of {test set: figures}, as the paper reports it."""
    return {name: mean(figures[name] for figures in run.values()) for name in [*run.values()][0]}


def cell(name, runs):
    """A figure's mean over runs ± standard deviation (differences: standard error), shares in per cent."""
    scale, digits = {"n": (1, 0), "tokens": (1, 2), "latents": (1, 2)}.get(name, (100, 1))
    values = [scale * figures[name] for figures in runs if name in figures]
    sign, count = ("+", len(values)) if name.startswith("to ") else ("", 1)
    error = f" ± {stdev(values) / count**0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.{digits}f}{error}" if values else ""


def table(rows, names=("tokens", "coherence")):
    """Markdown of [(label, run, ...)], runs being {test set: figures}: accuracy, then means over sets."""
    lines = []
    for label, *runs in rows:
        cells = {name: cell("accuracy", [run[name] for run in runs]) for name in runs[0]}
        means = [over_sets(run) for run in runs]
        if len(cells) > 1:
            cells["mean"] = cell("accuracy", means)
        cells |= {f"{n} %" if "@" in n or n == "coherence" else n: cell(n, means) for n in names}
        lines.append([label, *cells.values()])
    lines = [["", *cells], ["---"] + ["---:"] * len(cells), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measure(path, data, args):
    """Evaluate path's checkpoint on {test set: examples}, and print the questions of --explain. Returns a
    record: its configuration, the figures of each set, what was printed."""
    ckpt, device = find_checkpoint(path), device_of(args.device)
    auto = "auto" if device.type == "cuda" else None
    model, tokenizer = LatentReasoner.from_pretrained(ckpt, device=device), Tokenizer.from_pretrained(ckpt)
    record = {"checkpoint": str(ckpt), **read_state(ckpt), "benchmarks": {}, "explained": {}}
    for llama in model.llamas() if args.compile in ("yes", auto) else ():
        llama.compile_blocks()
    for name, examples in data.items():
        encoded, skipped = encode_all(examples, tokenizer, model.policy.config.max_position_embeddings)
        if not encoded:
            raise ValueError(f"{name}: none of its questions fits the context of {ckpt}")
        if skipped:
            print(f"{name}: {skipped} questions do not fit the context")
        record["benchmarks"][name], results = evaluate(
            model, tokenizer, encoded, args.batch_size, args.samples, args.seed, args.max_tokens,
            args.temperature, args.dtype in ("bfloat16", auto), name)
        record["explained"][name] = results[:args.explain]
        for r in results[:args.explain]:
            print(f"{r['id']}: {r['question']}")
            for step, reference in zip_longest(r["plan"], r["steps"], fillvalue=""):
                print(f"  {step:<20} reference: {reference}")
            print(f"  {r['text']:<20} reference: {r['answer']} ({'right' if r['accuracy'] else 'wrong'})\n")
    return record


FLAGS = {  # help, default, other choices
    "ckpt": ("checkpoint, run, or folder of runs: the newest", "out"),
    "data_dir": ("folder of the published files", "data"),
    "split": ("of each set", "test", "valid", "train"),
    "limit": ("questions of each set (0: all)", 0),
    "samples": ("rollouts a question for pass@k and maj@k", 0),
    "temperature": ("of sampled answers (0: greedy)", 1.0),
    "batch_size": ("rollouts in one pass (0: 128, on a GPU 512)", 0),
    "max_tokens": ("of a written chain of thought", 160),
    "explain": ("questions of each set to print, with plans", 0),
    "seed": ("of the samples", 0),
    "device": ("auto: a GPU if there is one", "auto", "cpu", "cuda"),
    "dtype": ("auto: bfloat16 on a GPU", "auto", "float32", "bfloat16"),
    "compile": ("auto: on a GPU", "auto", "yes", "no"),
    "json": ("file for configuration and figures", "")}


def parser():
    p = Parser(description=__doc__.split("\n")[0])
    p.add_argument("--data", nargs="+", default=TEST_SETS, help=f"sets or files [{' '.join(TEST_SETS)}]")
    for name, (text, default, *others) in FLAGS.items():
        p.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} [{default}]",
                       choices=[default, *others] if others else None)
    return p


def read_sets(args):
    """{test set: examples} of --data. ValueError for a flag out of range."""
    for name, value in vars(args).items():
        least = int(name == "max_tokens")
        if type(value) in (int, float) and not least <= value < 2**32:
            raise ValueError(f"--{name} {value}: must be from {least} to 2^32 - 1")
    if args.json:
        open(args.json, "a").close()  # what cannot be written fails now, not after the work
    return {name: load(name, args.split, args.data_dir)[:args.limit or None] for name in args.data}


def evaluate_runs(rows, sets, split, data_dir, device, dtype, compile):
    """Print the table of [(label, run's folder)] on the sets."""
    args = parser().parse_args([])
    vars(args).update(data=sets, split=split, data_dir=data_dir, device=device, dtype=dtype, compile=compile)
    data = read_sets(args)
    print(table([(label, measure(run, data, args)["benchmarks"]) for label, run in rows]))


def main(argv=None):
    args = parser().parse_args(argv)
    data = read_sets(args)
    record = measure(args.ckpt, data, args)
    sets = record["benchmarks"]
    sets = sets | {"mean": over_sets(sets)} if len(sets) > 1 else sets
    names = [name for name in over_sets(sets) if name != "accuracy"]
    print(table([(name, {"accuracy %": figures}) for name, figures in sets.items()], names))
    if args.json:
        write_json(args.json, record)


if __name__ == "__main__":
    cli(main)
