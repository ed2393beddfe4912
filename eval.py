"""Evaluate checkpoints: accuracy, tokens, latents, coherence; pass@k and maj@k; plans in words; runs compared.

    python eval.py                                    newest checkpoint under out/, four built-in test sets
    python eval.py --ckpt out/rl --data gsm8k svamp --samples 8 --explain 5 --json results.json
    python eval.py --compare out_0 out_1 out_2        every run in these folders, over their seeds

A checkpoint carries its whole configuration: nothing about model, method or stage is repeated here.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import TEST_SETS, Parser, Tokenizer, encode_all, extract_answer, is_correct, load
from model import read_json, write_json
from rl import answer_texts, coherence, plan_texts
from vae import LatentReasoner, Noise


def find_checkpoint(path):
    """The newest complete checkpoint in `path`: itself, in a run's folder, or in the newest of the runs below it. Of a
    run's checkpoints that of the latest step (a copied folder has its files' times in any order)."""
    path = Path(path)
    if (path / "train.json").is_file() and (path / "latent.json").is_file():
        return path
    found = [p.parent for p in (*path.glob("step-*/train.json"), *path.glob("*/step-*/train.json"))]
    if not found:
        raise FileNotFoundError(f"{path}: no checkpoint there (make one with `python train.py`, or name one)")
    newest = max(found, key=lambda p: (p / "train.json").stat().st_mtime)
    return max((p for p in found if p.parent == newest.parent), key=lambda p: (len(p.name), p.name))


def read_state(ckpt):
    """What train.json says of a checkpoint: the configuration it was trained with, its step. ValueError without."""
    file = Path(ckpt) / "train.json"
    state = read_json(file)
    config = state.get("config") if isinstance(state, dict) else None
    if not isinstance(config, dict) or type(state.get("step")) is not int:
        raise ValueError(f"{file}: keys 'config' and 'step' of a checkpoint are missing")
    if not isinstance(config.get("method"), str) or type(config.get("seed")) is not int:
        raise ValueError(f"{file}: config has no 'method' or no 'seed'")
    return state


def read_metrics(lines, file):
    """The lines of metrics.jsonl as dicts. ValueError: `file` has one that is none, or without its step."""
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
            rows[-1]["step"] + 0
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{file}:{number}: not a line of metrics (JSON with a step); delete it") from None
    return rows


def token_limit(model, longest):
    """Most tokens of an answer: 16, and for text methods room for the chain of thought."""
    return 16 if model.config.latent else min(longest, model.policy.config.max_position_embeddings)


def check_device(name):
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch sees no GPU")


def check_vocabulary(tokenizer, policy, path):
    """ValueError where ids of the tokenizer have no row in the weights."""
    if tokenizer.vocab_size > policy.config.vocab_size:
        raise ValueError(f"{path}: its tokenizer has {tokenizer.vocab_size} ids, its weights have rows for "
                         f"{policy.config.vocab_size}: they do not belong together")


@torch.no_grad()
def evaluate(model, tokenizer, encoded, batch_size=128, samples=0, seed=0, max_tokens=160, temperature=1.0,
             latent_temperature=1.0, progress=None):
    """Figures of a list of data.Encoded questions (a dict of numbers), and what became of each (a list of dicts).

    accuracy, coherence: 0 to 1; tokens: latents used + answer tokens without <eos>, mean per question; pass@j: unbiased
    estimate from `samples` rollouts (Chen et al. 2021, arXiv 2107.03374); maj@k: the most frequent answer is right."""
    model.eval()
    config = model.config
    limit = token_limit(model, max_tokens)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].question))
    totals, answered = Counter(), {}
    ks = sorted({min(2**i, samples) for i in range(samples.bit_length() + 1)}) if samples else []
    rows, done = max(1, batch_size // max(1, samples)), 0
    for part in [order[i:i + batch_size] for i in range(0, len(order), batch_size)]:
        batch = [encoded[i] for i in part]
        rollout = model.rollout([e.question for e in batch], max_tokens=limit)
        texts, ended = answer_texts(rollout, tokenizer, config.eos_id)
        plans = [[]] * len(batch)
        if model.decoder is not None:
            plans = plan_texts(model, rollout.z, rollout.steps, tokenizer)
        latents = (rollout.steps * config.thoughts_per_step).tolist()
        for i, e, text, end, plan, used, n in zip(part, batch, texts, ended, plans, latents, rollout.lengths.tolist()):
            correct = is_correct(text, e.example)
            totals["accuracy"] += correct
            totals["latents"] += used
            totals["tokens"] += used + n - end
            totals["coherence"] += coherence(plan, extract_answer(text))
            answered[i] = dict(id=e.example.id, question=e.example.question, reference=list(e.example.steps),
                               plan=plan, answer=text, right=e.example.answer, correct=correct)
        done += len(part)
        if progress:
            progress.update(len(part))
            progress.set_postfix(accuracy=f"{totals['accuracy'] / done:.3f}")
    for part in [order[i:i + rows] for i in range(0, len(order), rows)] if samples else ():
        batch = [encoded[i] for i in part]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + part[0])
        noise = Noise.draw(len(batch) * samples, config, model.policy.config.hidden_size, limit, generator)
        rollout = model.rollout([e.question for e in batch], samples, noise, limit, temperature, latent_temperature)
        texts, _ = answer_texts(rollout, tokenizer, config.eos_id)
        for j, e in enumerate(batch):
            mine = texts[j * samples:(j + 1) * samples]
            right = sum(is_correct(t, e.example) for t in mine)
            for k in ks:
                totals[f"pass@{k}"] += 1 - math.comb(samples - right, k) / math.comb(samples, k)
            votes = Counter(a for a in map(extract_answer, mine) if a is not None)
            totals[f"maj@{samples}"] += bool(votes) and is_correct(f"### {votes.most_common(1)[0][0]}", e.example)
        if progress:
            progress.update(len(part))
    names = ["accuracy", "tokens", "latents", "coherence", *(f"pass@{k}" for k in ks)]
    names += [f"maj@{samples}"] if samples else []
    figures = {"n": len(encoded), **{name: totals[name] / max(1, len(encoded)) for name in names}}
    return figures, [answered[i] for i in range(len(encoded))]


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


def measure(ckpt, sets, args):
    """({set: figures}, {set: what became of each question}) of a checkpoint on [(name, examples)]."""
    model = LatentReasoner.from_pretrained(ckpt, device=args.device)
    tokenizer = Tokenizer.from_pretrained(ckpt)
    check_vocabulary(tokenizer, model.policy, ckpt)
    benchmarks, answered = {}, {}
    for name, examples in sets:
        examples = examples[:args.limit] if args.limit else examples
        encoded, skipped = encode_all(examples, tokenizer, model.policy.config.max_position_embeddings)
        if not encoded:
            raise ValueError(f"{name}: none of its questions fits the context of {ckpt}")
        if skipped:
            print(f"{name}: {skipped} questions are longer than the context and were left out", file=sys.stderr)
        with tqdm(total=len(encoded) * (2 if args.samples else 1), desc=name, disable=None, leave=False) as bar:
            benchmarks[name], answered[name] = evaluate(model, tokenizer, encoded, args.batch_size, args.samples,
                                                        args.seed, args.max_tokens, args.temperature,
                                                        args.latent_temperature, bar)
    return benchmarks, answered


# --- runs compared ---

# settings that do not make two runs two experiments: the seed, names of files, and how a run is carried out
ASIDE = {"seed", "stage", "init", "out_dir", "data_dir", "resume", "baseline", "micro_batch", "device", "compile",
         "threads", "activation_checkpointing", "eval_every", "eval_size", "log_every", "save_every", "keep"}
# those that mean nothing to a supervised run
PLANNING = {"rl_lr", "rl_min_lr", "rl_warmup", "rl_iters", "questions_per_step", "group", "minibatch", "w_acc", "w_fmt",
            "w_coh", "ratio_clip", "std_norm", "latent_grad", "latent_coef", "latent_mean", "kl_coef", "temperature",
            "latent_temperature", "max_answer"}


@dataclass
class Result:
    """One checkpoint, evaluated or about to be."""

    ckpt: Path
    state: dict  # train.json
    benchmarks: dict = field(default_factory=dict)  # set -> figures
    answered: dict = field(default_factory=dict)  # set -> what became of each question

    @property
    def config(self):
        return self.state["config"]

    @property
    def seed(self):
        return self.config["seed"]

    @property
    def mean(self):
        return mean_figures(list(self.benchmarks.items()))

    @property
    def planned(self):
        return self.state.get("stage") == "rl"

    @property
    def kind(self):
        return self.config["method"] + (" + rl" if self.planned else "")

    @property
    def settings(self):
        """What makes the run the experiment that it is."""
        return {k: v for k, v in self.config.items() if k not in ASIDE and (self.planned or k not in PLANNING)}

    def metrics(self):
        file = self.ckpt.parent / "metrics.jsonl"
        return read_metrics(file.read_text().splitlines(), file)

    def summary(self):
        return {"checkpoint": str(self.ckpt), "config": self.config, "benchmarks": self.benchmarks}


@dataclass
class Group:
    """Runs of one configuration, one a seed."""

    label: str
    results: list

    def values(self, figure, benchmark=None):
        """{seed: a figure}, of the mean over the sets or of one."""
        return {r.seed: (r.benchmarks[benchmark] if benchmark else r.mean)[figure] for r in self.results}


def checkpoints(path):
    """The newest checkpoint of every run in `path`: a checkpoint, a run's folder, or a folder of runs."""
    path = Path(path)
    runs = sorted({p.parent.parent for p in path.glob("*/step-*/train.json")})
    return [find_checkpoint(r) for r in runs] or [find_checkpoint(path)]


def grouped(results):
    """Groups of Results in the order of their first ones. The label is the method, and what sets a group apart from the
    first one of that method. ValueError where a configuration has a seed twice."""
    groups = {}
    for r in results:
        same = groups.setdefault((r.kind, json.dumps(r.settings, sort_keys=True)), [])
        twice = [o.ckpt for o in same if o.seed == r.seed]
        if twice:
            raise ValueError(f"{twice[0]} and {r.ckpt} are runs of one configuration and one seed: name one of them")
        same.append(r)
    out, plain = [], {}
    for same in groups.values():
        kind, settings = same[0].kind, same[0].settings
        usual = plain.setdefault(kind, settings)
        out.append(Group(", ".join([kind, *(f"{k} {v}" for k, v in settings.items() if v != usual.get(k))]), same))
    return out


def spread(values, scale=100, digits=1):
    """Mean and, of more than one, standard deviation, as text."""
    values = [scale * v for v in values]
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def difference(group, baseline):
    """(mean difference of accuracy, mean over the sets; its standard error), or None where no seed is in both groups.

    Runs are paired by seed. With two seeds or more the error is that of the mean over seeds; with one it is that of the
    questions alone, paired."""
    a, b = ({r.seed: r for r in g.results} for g in (group, baseline))
    seeds = a.keys() & b.keys()
    if not seeds:
        return None
    gains = [a[s].mean["accuracy"] - b[s].mean["accuracy"] for s in seeds]
    if len(seeds) > 1:
        return statistics.mean(gains), statistics.stdev(gains) / len(gains)**0.5
    a, b = (g[next(iter(seeds))].answered for g in (a, b))
    variance = 0.0
    for name in a:
        theirs = {e["id"]: e["correct"] for e in b[name]}
        pairs = [e["correct"] - theirs[e["id"]] for e in a[name] if e["id"] in theirs]
        variance += statistics.variance(pairs) / len(pairs) if len(pairs) > 1 else math.inf
    return gains[0], variance**0.5 / len(a)


def comparison(groups, baseline):
    """Markdown, a row a group. Accuracy, coherence, pass@k, maj@k in per cent; mean ± standard deviation over seeds;
    difference to the baseline ± its standard error."""
    sets = list(groups[0].results[0].benchmarks)
    more = [k for k in groups[0].results[0].mean if k not in ("n", "accuracy", "tokens", "latents")]
    rows = []
    for g in groups:
        gain = difference(g, baseline) if g is not baseline else None
        row = [g.label, str(len(g.results)), *(spread(g.values("accuracy", s).values()) for s in sets)]
        row += [spread(g.values("accuracy").values())] * (len(sets) > 1)
        row += [f"{100 * gain[0]:+.1f} ± {100 * gain[1]:.1f}" if gain else ""]
        row += [spread(g.values(k).values(), 1, 2) for k in ("tokens", "latents")]
        rows.append(row + [spread(g.values(k).values()) for k in more])
    head = ["", "seeds", *sets, *["mean"] * (len(sets) > 1), f"to {baseline.label}", "tokens", "latents", *more]
    return markdown(head, rows)


def pyplot(file):
    """matplotlib.pyplot without a display. ValueError where it is not installed, or does not write such a file."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib, which is not installed (pip install matplotlib)") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    formats = plt.FigureCanvasBase.get_supported_filetypes()
    if Path(file).suffix[1:] not in formats:
        raise ValueError(f"--plot {file}: its name must end in .{', .'.join(sorted(formats))}")
    return plt


CURVES = ("reward", "accuracy", "coherence", "latents", "sigma", "ratio_max", "clip_frac", "grad_norm")  # of rl_step


def plot(file, groups):
    """Accuracy against tokens (mean over the sets and seeds, bars of a standard deviation), and what metrics.jsonl has
    of the RL runs: a thin line a seed, a thick one for their mean, smoothed over 5 lines."""
    plt = pyplot(file)
    planned = [(f"C{i % 10}", [r.metrics() for r in g.results]) for i, g in enumerate(groups) if g.results[0].planned]
    panels = 1 + (len(CURVES) if planned else 0)
    fig, axes = plt.subplots(-(-panels // 3), min(panels, 3), figsize=(4.2 * min(panels, 3), 2.8 * -(-panels // 3) + 1),
                             squeeze=False, layout="constrained")
    axes = list(axes.flat)
    for i, g in enumerate(groups):
        x, y = (list(g.values(k).values()) for k in ("tokens", "accuracy"))
        bar = lambda v: statistics.stdev(v) if len(v) > 1 else 0
        axes[0].errorbar(statistics.mean(x), statistics.mean(y), bar(y), bar(x), "o", color=f"C{i % 10}", label=g.label)
    axes[0].set(xlabel="tokens an answer", title="accuracy")
    fig.legend(loc="outside lower center", ncols=2, fontsize="small")
    for axis, name in zip(axes[1:], CURVES if planned else ()):
        for color, runs in planned:
            steps = {}
            for run in runs:
                points = [(line["step"], line[name]) for line in run if name in line]
                axis.plot(*zip(*points), color=color, alpha=0.2, linewidth=0.8)
                for step, value in points:
                    steps.setdefault(step, []).append(value)
            mean = [statistics.mean(v) for _, v in sorted(steps.items())]
            smooth = [statistics.mean(mean[max(0, j - 2):j + 3]) for j in range(len(mean))]
            axis.plot(sorted(steps), smooth, color=color)
        axis.set(xlabel="RL step", title=name)
        axis.ticklabel_format(useOffset=False)
    for axis in axes[panels:]:
        axis.remove()
    fig.savefig(file, dpi=90)
    plt.close(fig)


# --- the command line ---

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
    p.add_argument("--ckpt", help="checkpoint, run folder, or folder of runs: the newest in it (out)")
    p.add_argument("--data", nargs="+", default=list(TEST_SETS),
                   help=f"test sets or files ({', '.join(TEST_SETS)}; chain: a fifth of this kind)")
    p.add_argument("--data_dir", default="data", help="where `python data.py` put the published files (data)")
    p.add_argument("--split", default="test", choices=("train", "valid", "test"), help="split of each set (test)")
    p.add_argument("--limit", type=int, default=0, help="only the first N questions of each set (0: all)")
    p.add_argument("--samples", type=int, default=0, help="k sampled rollouts a question: adds pass@k and maj@k (0)")
    p.add_argument("--temperature", type=float, default=1.0, help="of the answer tokens of samples; 0: only latents and "
                   "stops are sampled (1)")
    p.add_argument("--latent_temperature", type=float, default=1.0, help="of the latents of samples: times sigma; 0: only "
                   "stops and answers are sampled (1)")
    p.add_argument("--batch_size", type=int, default=128, help="rollouts in one pass (128)")
    p.add_argument("--max_tokens", type=int, default=160, help="longest written chain of thought, text methods (160)")
    p.add_argument("--explain", type=int, default=0, help="print N questions of each set with the plan in words (0)")
    p.add_argument("--seed", type=int, default=0, help="of the samples (0)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"),
                   help="cuda where there is one, else cpu")
    p.add_argument("--json", metavar="FILE", help="write everything there")
    p.add_argument("--compare", nargs="+", metavar="DIR", help="a table of these runs, or of all runs in these "
                   "folders: those that differ by no more than their seed are one row")
    p.add_argument("--baseline", metavar="DIR", help="one run of the row that differences are taken to (the first)")
    p.add_argument("--plot", metavar="FILE", help="with --compare: a picture of accuracy against tokens and of the RL "
                   "curves (needs matplotlib)")
    args = p.parse_args(argv)
    if not args.compare and (args.baseline or args.plot):
        raise ValueError("--baseline and --plot go with --compare")
    if args.compare and (args.ckpt or args.explain):
        raise ValueError("--ckpt and --explain go without --compare")
    check_device(args.device)
    if not 0 <= args.seed < 2**32:
        raise ValueError("--seed must be from 0 to 2^32 - 1")
    for name in ("json", "plot"):
        file = getattr(args, name)
        if file and not Path(file).absolute().parent.is_dir():
            raise FileNotFoundError(f"--{name} {file}: no such folder")
        if file and Path(file).is_dir():
            raise ValueError(f"--{name} {file}: that is a folder; name a file")
    for name in ("limit", "samples", "explain"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} must not be negative")
    for name in ("temperature", "latent_temperature"):
        if getattr(args, name) and not 1e-3 <= getattr(args, name) < math.inf:
            raise ValueError(f"--{name} must be 0 or at least 0.001")
    if args.batch_size < 1 or args.max_tokens < 1:
        raise ValueError("--batch_size and --max_tokens must be at least 1")
    if args.samples > 10_000:
        raise ValueError("--samples must be at most 10000: those of a question go through the model together")
    if args.plot:
        pyplot(args.plot)  # before the work
    named = [c for path in args.compare or () for c in checkpoints(path)]
    paths = list(dict.fromkeys(named)) or [find_checkpoint("out" if args.ckpt is None else args.ckpt)]  # none twice
    sets = [(name, load(name, args.split, args.data_dir)) for name in args.data]
    results = [Result(c, read_state(c)) for c in paths]
    if args.compare:  # whatever is wrong with the runs, before the work
        groups = grouped(results)
        baseline = groups[0]
        if args.baseline:
            wanted = set(checkpoints(args.baseline))
            baseline = next((g for g in groups if wanted & {r.ckpt for r in g.results}), None)
            if baseline is None:
                raise ValueError(f"--baseline {args.baseline}: not one of the runs that --compare names")
        for r in results if args.plot else ():
            if r.planned:
                r.metrics()
    for r in results:
        r.benchmarks, r.answered = measure(r.ckpt, sets, args)
    if args.compare:
        print(comparison(groups, baseline))
        if args.plot:
            plot(args.plot, groups)
        if args.json:
            write_json(args.json, [{"label": g.label, "seed": r.seed, **r.summary()}
                                   for g in groups for r in g.results])
        return
    [result] = results
    explained = {name: rows[:args.explain] for name, rows in result.answered.items()}
    for e in sum(explained.values(), []):
        print(explanation(e), end="\n\n")
    print(f"{result.ckpt} ({result.config['method']})\n")
    rows = list(result.benchmarks.items())
    print(table(rows + ([("mean", mean_figures(rows))] if len(rows) > 1 else [])))
    if args.json:
        write_json(args.json, result.summary() | ({"explained": explained} if args.explain else {}))


if __name__ == "__main__":
    run_main(main)
