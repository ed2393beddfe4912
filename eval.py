"""Evaluate a checkpoint: accuracy, tokens, latents, coherence; pass@k and maj@k; plans in words.

    python eval.py                                    newest checkpoint under out/, the built-in test sets
    python eval.py --ckpt out/rl --data gsm8k svamp --samples 8 --explain 5 --json results.json

A checkpoint carries its whole configuration: nothing about model, method or stage is repeated here.
"""

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import TEST_SETS, Parser, Tokenizer, encode_all, extract_answer, is_correct, load, parse_number
from model import read_json, write_json
from rl import answer_texts, coherence, plan_texts
from vae import LatentReasoner, Noise


def find_checkpoint(path):
    """The newest complete checkpoint in `path`: itself, in a run's folder, or in the runs below it."""
    path = Path(path)
    if (path / "train.json").is_file() and (path / "latent.json").is_file():
        return path
    found = [p.parent for p in (*path.glob("step-*/train.json"), *path.glob("*/step-*/train.json"))]
    if not found:
        raise FileNotFoundError(f"{path}: no checkpoint there (make one with `python train.py`, or name one)")
    return max(found, key=lambda p: ((p / "train.json").stat().st_mtime, p.name))


def read_state(ckpt):
    """What train.json says of a checkpoint: the configuration it was trained with, its step. ValueError without."""
    file = Path(ckpt) / "train.json"
    state = read_json(file)
    if not isinstance(state, dict) or not isinstance(state.get("config"), dict) or type(state.get("step")) is not int:
        raise ValueError(f"{file}: keys 'config' and 'step' of a checkpoint are missing")
    return state


def token_limit(model, longest):
    """Most tokens of an answer: 16, and for text methods room for the chain of thought."""
    return 16 if model.config.latent else longest


@torch.no_grad()
def evaluate(model, tokenizer, encoded, batch_size=128, samples=0, seed=0, max_tokens=160, progress=None, explain=0):
    """Figures of a list of data.Encoded questions: a dict of numbers, and `explain` explanations.

    accuracy, coherence: 0 to 1; tokens: latents used + answer tokens without <eos>, mean per question; pass@j: unbiased
    estimate from `samples` rollouts (Chen et al. 2021, arXiv 2107.03374); maj@k: the most frequent answer is right."""
    model.eval()
    config = model.config
    limit = token_limit(model, max_tokens)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].question))
    totals, explained = Counter(), {}
    ks = sorted({min(2**i, samples) for i in range(samples.bit_length() + 1)}) if samples else []
    rows, done = max(1, batch_size // max(1, samples)), 0
    for part in [order[i:i + batch_size] for i in range(0, len(order), batch_size)]:
        batch = [encoded[i] for i in part]
        rollout = model.rollout([e.question for e in batch], max_tokens=limit)
        texts, ended = answer_texts(rollout, tokenizer, config.eos_id)
        plans = plan_texts(model, rollout, tokenizer) if model.decoder is not None else [[]] * len(batch)
        latents = (rollout.steps * config.thoughts_per_step).tolist()
        for i, e, text, end, plan, used, n in zip(part, batch, texts, ended, plans, latents, rollout.lengths.tolist()):
            correct = is_correct(text, e.example)
            totals["accuracy"] += correct
            totals["latents"] += used
            totals["tokens"] += used + n - end
            totals["coherence"] += coherence(plan, extract_answer(text))
            if i < explain:
                explained[i] = dict(id=e.example.id, question=e.example.question, reference=list(e.example.steps),
                                    plan=plan, answer=text, right=e.example.answer, correct=correct)
        done += len(part)
        if progress:
            progress.update(len(part))
            progress.set_postfix(accuracy=f"{totals['accuracy'] / done:.3f}")
    for part in [order[i:i + rows] for i in range(0, len(order), rows)] if samples else ():
        batch = [encoded[i] for i in part]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + part[0])
        noise = Noise.draw(len(batch) * samples, config, model.policy.config.hidden_size, limit, generator)
        rollout = model.rollout([e.question for e in batch], samples, noise, limit)
        texts, _ = answer_texts(rollout, tokenizer, config.eos_id)
        for j, e in enumerate(batch):
            mine = texts[j * samples:(j + 1) * samples]
            right = sum(is_correct(t, e.example) for t in mine)
            for k in ks:
                totals[f"pass@{k}"] += 1 - math.comb(samples - right, k) / math.comb(samples, k)
            votes = Counter(parse_number(a) for a in map(extract_answer, mine) if a is not None)
            totals[f"maj@{samples}"] += bool(votes) and is_correct(f"### {votes.most_common(1)[0][0]}", e.example)
        if progress:
            progress.update(len(part))
    names = ["accuracy", "tokens", "latents", "coherence", *(f"pass@{k}" for k in ks)]
    names += [f"maj@{samples}"] if samples else []
    figures = {"n": len(encoded), **{name: totals[name] / max(1, len(encoded)) for name in names}}
    return figures, [explained[i] for i in sorted(explained)]


def markdown(head, rows):
    """A Markdown table of texts, the first column to the left."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(rows):
    """Markdown of [(label, figures)], in per cent where it is a share."""
    names = list(rows[0][1])
    share = lambda n: n in ("accuracy", "coherence") or "@" in n
    show = lambda f, n: f"{100 * f[n]:.1f}" if share(n) else f"{f[n]:.2f}" if n != "n" else str(f[n])
    head = ["", *(n + " %" if share(n) else n for n in names)]
    return markdown(head, [[label, *(show(f, n) for n in names)] for label, f in rows])


def mean_figures(rows):
    """The mean over benchmarks, as the paper reports it."""
    total = {k: sum(f[k] for _, f in rows) for k in rows[0][1]}
    return {k: v if k == "n" else v / len(rows) for k, v in total.items()}


def explanation(e):
    """One explained question as text: each latent step in words beside the reference step."""
    lines = [f"{e['id']}: {e['question']}"]
    width = max([len(s) for s in e["plan"]] + [10])
    for k in range(max(len(e["plan"]), len(e["reference"]))):
        plan, reference = (steps[k] if k < len(steps) else "" for steps in (e["plan"], e["reference"]))
        lines.append(f"  step {k + 1}: {plan:<{width}}   reference: {reference}")
    lines.append(f"  {e['answer'].strip()!r} ({'right' if e['correct'] else 'wrong'}, reference {e['right']})")
    return "\n".join(lines)


def first_to_say(text):
    """Whether this process is the one of torchrun's to print an error. Before the processes are joined an error lies
    in what all processes of a machine share, the command line and the files; after, the first that has it says it."""
    if not dist.is_initialized():
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return dist.distributed_c10d._get_default_store().add(f"error: {text}", 1) == 1
    except dist.DistError:  # the process that held the store is gone
        return True


def run_main(main):
    """Call main(): what users can mend becomes one line on stderr and exit status 2; a run that its numbers or the
    machine (a full disk) end, one line and 1; Ctrl-C 130."""
    try:
        sys.exit(main())
    except (ValueError, OSError, FloatingPointError) as e:
        if first_to_say(str(e)):
            print(f"error: {e}", file=sys.stderr, flush=True)
            if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun's last lines say what is in it
                said = {"message": f"error: {e}", "extraInfo": {"timestamp": int(time.time())}}
                Path(file).write_text(json.dumps({"message": said}))
        else:
            time.sleep(10)  # torchrun ends all when the first ends: let that be the one that says why
        sys.exit(2 if isinstance(e, (ValueError, FileNotFoundError)) else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def main(argv=None):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default="out", help="checkpoint, run folder, or folder of runs: the newest in it (out)")
    p.add_argument("--data", nargs="+", default=list(TEST_SETS), help="test sets or files (the built-in test sets)")
    p.add_argument("--data_dir", default="data", help="where `python data.py` put the published files (data)")
    p.add_argument("--split", default="test", choices=("train", "valid", "test"), help="split of each set (test)")
    p.add_argument("--limit", type=int, default=0, help="only the first N questions of each set (0: all)")
    p.add_argument("--samples", type=int, default=0, help="k sampled rollouts a question: adds pass@k and maj@k (0)")
    p.add_argument("--batch_size", type=int, default=128, help="rollouts in one pass (128)")
    p.add_argument("--max_tokens", type=int, default=160, help="longest written chain of thought, text methods (160)")
    p.add_argument("--explain", type=int, default=0, help="print N questions of each set with the plan in words (0)")
    p.add_argument("--seed", type=int, default=0, help="of the samples (0)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    p.add_argument("--json", metavar="FILE", help="write everything there")
    args = p.parse_args(argv)
    for name in ("limit", "samples", "explain"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} must not be negative")
    if args.batch_size < 1 or args.max_tokens < 1:
        raise ValueError("--batch_size and --max_tokens must be at least 1")
    ckpt = find_checkpoint(args.ckpt)
    sets = [(name, load(name, args.split, args.data_dir)) for name in args.data]  # a wrong name before the work
    model = LatentReasoner.from_pretrained(ckpt, device=args.device)
    tokenizer = Tokenizer.from_pretrained(ckpt)
    rows, explained = [], {}
    for name, examples in sets:
        examples = examples[:args.limit] if args.limit else examples
        encoded, skipped = encode_all(examples, tokenizer, model.policy.config.max_position_embeddings)
        if skipped:
            print(f"{name}: {skipped} questions are longer than the context and were left out", file=sys.stderr)
        with tqdm(total=len(encoded) * (2 if args.samples else 1), desc=name, disable=None, leave=False) as bar:
            figures, texts = evaluate(model, tokenizer, encoded, args.batch_size, args.samples, args.seed,
                                      args.max_tokens, bar, args.explain)
        rows.append((name, figures))
        explained[name] = texts
        for e in texts:
            print(explanation(e), end="\n\n")
    print(f"{ckpt} ({model.config.method})\n")
    print(table(rows + ([("mean", mean_figures(rows))] if len(rows) > 1 else [])))
    if args.json:
        out = {"checkpoint": str(ckpt), "config": read_state(ckpt)["config"], "benchmarks": dict(rows)}
        write_json(args.json, {**out, "explained": explained} if args.explain else out)


if __name__ == "__main__":
    run_main(main)
