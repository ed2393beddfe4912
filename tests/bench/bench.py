"""Speed and memory: supervised training, reinforcement learning, evaluation, loading.

    python tests/bench/bench.py                             all CPU workloads (about 15 minutes on 2 cores)
    python tests/bench/bench.py --workloads E T --json bench.json
    python tests/bench/bench.py --workloads 1B-train        Llama-3.2-1B's shape on a GPU (about 10 minutes)
    python tests/bench/bench.py --counts                    what a CPU can count (2 minutes)
    python tests/bench/bench.py --ratios                    how far a step moves the density of latents
    python tests/bench/bench.py --signal out/vae            how much of RL's gradients is signal (2 minutes)
    python tests/bench/bench.py --diversity out/vae out/rl  how unlike samples are (2 minutes each)

S   SmolLM2-135M's shape, batch 8, up to 4 steps of 2 latents (its weights and tokenizer from --smollm2 DIR)
T   a small LLaMA with a big vocabulary (256 wide, 4 layers, 49152 tokens), batch 32, up to 8 steps of 2
    latents
E   the embedded default of train.py, all latent
1B  Llama-3.2-1B's shape: random weights written in bfloat16, then loaded
1B-train  the same shape in one process, with the settings for pretrained models: SFT, RL, evaluation

Questions are those of GSM8K's training set with 2 to K annotated steps, where --data_dir and --smollm2
have what that needs, else those of the built-in task (1B-train: random ids of GSM8K's lengths). Plans,
decoded steps and answers run to their limits, K steps and 16 tokens (64 a decoded step of real weights).
Each measurement but those of 1B-train has a process of its own, since peak memory is a figure of a process.
It takes the peak of fp32 matrix products (2048 x 2048) before and after.

Utilisation = useful FLOPs / s over that peak. Useful FLOPs of a forward pass, per layer and token: 2 x
(matrix parameters of the layer); per layer and pair of a query and a key that it may see: 4 x heads x
head_dim; per logit that a loss reads: 2 d. Plus the heads. Three times that with the backward pass. Padding,
repeated passes, logits that nobody reads and the optimizer count nothing.
"""

import argparse
import json
import mmap
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]

from data import ASSETS, Encoded, Example, Tokenizer, encode_all, load  # noqa: E402
from eval import evaluate  # noqa: E402
from model import LLaMA, LLaMAConfig, write_json  # noqa: E402
from rl import LogProbs, rl_step, update  # noqa: E402
from train import (PRESETS, Config, Run, batch_indices, make_optimizer, micro_batches,  # noqa: E402
                   reuse_memory, set_lr, sft_noise)
from vae import (END, METHODS, START, LatentConfig, LatentReasoner, Noise, generator,  # noqa: E402
                 remaining_text, text_loss, to_device)

WORKLOADS = {  # shape, then K, c, batch, questions x group of an RL step, rows of a micro-batch
    "S": dict(shape=(576, 1536, 30, 9, 3), vocab=49152, K=4, c=2, batch=8, questions=4, group=8, micro=8),
    "T": dict(shape=(256, 688, 4, 4, 4), vocab=49152, K=8, c=2, batch=32, questions=16, group=8, micro=32),
    "E": dict(shape=(96, 256, 4, 4, 4), vocab=0, K=6, c=1, batch=32, questions=64, group=8, micro=128),
    "1B-train": dict(shape=(2048, 8192, 16, 32, 8), vocab=128256, K=10, c=2, batch=256, questions=16, group=8,
                     micro=128),
}
TINY = dict(shape=(64, 128, 2, 4, 2), vocab=500, K=3, batch=8, questions=2, micro=8)  # to try it on a CPU
# The released SIM-CoT code itself (its class, transformers 4.46, the same weights, data, batch, AdamW, fp32),
# measured apart, on 2 cores with a peak of 100 GFLOP/s: examples/s, GB at most, answers/s.
# tests/bench/simcot_released.py does that work here.
PUBLISHED = {"S": dict(examples_s=0.31, memory_gb=8.7, answers_s=0.29),
             "T": dict(examples_s=0.69, memory_gb=6.8, answers_s=0.77)}


# --- what is measured ---

def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(f, device):
    synchronize(device)
    start = time.perf_counter()  # unlike time.time() it never goes back, and tells microseconds apart
    f()
    synchronize(device)
    return time.perf_counter() - start


def matmul_peak(device, seconds=0.5):
    """GFLOP/s of fp32 matrix products, the best of those that fit in `seconds`, and of one at least."""
    a = torch.randn(2048, 2048, device=device)
    product = lambda step: timed(lambda: a @ a, device)
    return 2 * 2048**3 / min(rounds(product, seconds, least=1)[1:]) / 1e9


def markdown(head, rows):
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


class Stub:
    """Stands for a tokenizer where there is none: every text is a right answer."""

    def decode(self, ids):
        return "### 1"


def synthetic(count, vocab):
    """Encoded questions of random ids, in number and length of steps like GSM8K's."""
    rng = np.random.default_rng(0)
    ids = lambda low, high: rng.integers(vocab // 2, size=rng.integers(low, high + 1)).tolist()
    found = []
    for i in range(count):
        question = ids(*((30, 64) if rng.random() < 0.5 else (65, 110)))
        steps = [ids(8, 12) for _ in range(rng.integers(2, 9))]
        found.append(Encoded(question, steps, ids(5, 5), Example("", (), "1", f"synthetic:{i}")))
    return found


class Bench:
    """Model, data and Run of a workload."""

    def __init__(self, name, args, **changes):
        self.spec = spec = WORKLOADS[name] | changes
        d, ff, layers, heads, kv = spec["shape"]
        recipe = PRESETS["pretrained"] if name == "1B-train" else {}
        self.cfg = Config(**recipe | dict(
            stage="vae", hidden_size=d, intermediate_size=ff, layers=layers, heads=heads, context=512,
            thoughts_per_step=spec["c"], max_steps=spec["K"], batch_size=spec["batch"],
            micro_batch=spec["micro"], questions_per_step=spec["questions"], group=spec["group"],
            minibatch=spec["questions"] * spec["group"], device=args.device, compile=args.compile))
        self.run = Run(self.cfg, "vae")
        self.device = self.run.device
        ids = self.read(name, args)
        if name == "S" and self.data == "gsm8k":
            policy, self.weights = LLaMA.from_pretrained(args.smollm2, device=self.device), "SmolLM2-135M"
        else:
            torch.manual_seed(0)
            with self.device:
                policy = LLaMA(LLaMAConfig(ids["vocab"], d, ff, layers, heads, kv, d // heads,
                                           max_position_embeddings=256))  # decoded steps: 16 tokens at most
            self.weights = "random"
        policy.add_tokens([ids["start_id"], ids["end_id"]])
        config = LatentConfig(**METHODS["atp"], method="atp", thoughts_per_step=spec["c"],
                              max_steps=spec["K"], start_id=ids["start_id"], end_id=ids["end_id"],
                              eos_id=ids["eos_id"], vocab_size=policy.config.vocab_size)
        with self.device:
            self.model = LatentReasoner(policy, config)
        self.compiled = False
        self.use(self.run)

    def read(self, name, args):
        """Tokenizer and examples. Returns the ids that the model needs."""
        K, vocab = self.spec["K"], self.spec["vocab"]
        real = name != "E" and args.smollm2 and Path(args.smollm2).is_dir()
        if name == "1B-train" and not real:
            self.data, self.tokenizer = "synthetic", Stub()
            self.examples = synthetic(4000, vocab)
            return dict(vocab=vocab, start_id=vocab, end_id=vocab + 1, eos_id=1)
        self.tokenizer = Tokenizer.from_pretrained(args.smollm2 if real else ASSETS)
        self.tokenizer.add_special(START, END)
        self.data = "gsm8k" if real and (Path(args.data_dir) / "gsm8k_train.jsonl").is_file() else "builtin"
        encoded, _ = encode_all(load(self.data, "train", args.data_dir)[:4000], self.tokenizer, 512)
        self.examples = [e for e in encoded if 2 <= len(e.steps) <= K]
        start, end = self.tokenizer.add_special(START, END)
        return dict(vocab=vocab or self.tokenizer.vocab_size, start_id=start, end_id=end,
                    eos_id=self.tokenizer.end_id())

    def use(self, run):
        """Make `run` the one that works with the model, as Run.load does."""
        self.run = run
        run.model, run.tokenizer = self.model, self.tokenizer
        for llama in self.model.llamas():
            llama.activation_checkpointing = run.activation_checkpointing
            if run.compile and not self.compiled:
                llama.compile_blocks()
        self.compiled = run.compile

    def to_the_limit(self):
        """From now on no plan and no text ends before its limit: the worst case, and always the same work."""
        with torch.no_grad():
            self.model.stop_head[-1].bias.copy_(torch.tensor([1e3, -1e3]))
        self.model.config.eos_id = -1

    def memory(self):
        """Peak so far, GB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    def batch(self, step, size):
        return [self.examples[i] for i in batch_indices(0, step, len(self.examples), size)]

    def noise(self, rows, step):
        config, d = self.model.config, self.model.policy.config.hidden_size
        return Noise.draw(rows, config, d, self.cfg.max_answer, generator(0, step))

    def useful_flops(self, examples):
        """Of one supervised step, all latent (see the top of this file)."""
        c, K, d = self.spec["c"], self.spec["K"], self.model.policy.config.hidden_size
        total = 0.0
        for e in examples:
            n, rest = min(K, len(e.steps)), len(remaining_text(e, self.model.config, K))
            tokens = len(e.question) + 1 + n * c + rest
            total += forward_flops(self.model.policy.config, tokens, rest)
            for k in range(n):
                words = sum(map(len, e.steps[k:])) if k == K - 1 else len(e.steps[k])
                total += forward_flops(self.model.decoder.config, c + words, words + 1)
            total += 2 * (4 * d * d * (n * c + 1) + d * d * (n + 1))  # latent head, stop head
        return 3 * total


def forward_flops(config, tokens, logits):
    d, width = config.hidden_size, config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    matrices = d * (width + 2 * kv) + width * d + 3 * d * config.intermediate_size
    pairs = tokens * (tokens + 1) / 2
    layer = 2 * matrices * tokens + 4 * width * pairs
    return config.num_hidden_layers * layer + 2 * d * config.vocab_size * logits


def rounds(work, seconds, least=3):
    """What work(1), work(2), ... returned, for so many seconds after the first, which also pays for
    allocations and compilation. However short the time, there are `least` results after the first."""
    results = [work(1)]
    end = time.perf_counter() + seconds
    while len(results) <= least or time.perf_counter() < end:
        results.append(work(len(results) + 1))
    return results


def median(results, key):
    return float(np.median([r[key] for r in results[1:]]))


def sft_step(run, ddp, optimizer, examples, stage, noise, step):
    """The optimizer step of train.train_supervised. Returns the next step's noise."""
    weights = {"answer": 1.0, "stop": 1.0, "decode": run.cfg.decode_coef, "kl": run.cfg.beta_kl}
    batches = list(micro_batches(run, examples, stage, noise))
    for i, batch in enumerate(batches):
        with run.no_sync(ddp, i + 1 < len(batches)):
            with run.autocast():
                losses = ddp(to_device(batch, run.device))
            sum(weights[k] * v for k, v in losses.items()).backward()
    noise = sft_noise(run, len(examples), stage, step + 1)
    run.clip_gradients(optimizer, run.cfg.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    return noise


def supervised(b):
    """A function that makes supervised step n, all latent, and says what it took."""
    b.model.set_trainable()
    b.model.train()
    optimizer = make_optimizer(b.model, b.run.cfg, b.run.cfg.weight_decay)
    set_lr(optimizer, 1e-6, 1.0, 0.0, 1.0)
    ddp, K = b.run.wrap(b.model), b.spec["K"]
    noise = [sft_noise(b.run, b.spec["batch"], K, 1)]  # of the next step

    def work(step):
        batch = b.batch(step, b.spec["batch"])
        one = lambda: noise.append(sft_step(b.run, ddp, optimizer, batch, K, noise.pop(), step))
        s = timed(one, b.device)
        return {"s": s, "flops": b.useful_flops(batch)}
    return work


def sft(name, args, seconds=20.0):
    """Supervised steps, all latent: forward, backward, clip, AdamW."""
    b = Bench(name, args)
    peak = matmul_peak(b.device)
    found = rounds(supervised(b), seconds)
    gb, peak = b.memory(), max(peak, matmul_peak(b.device))
    s = sum(r["s"] for r in found[1:])
    rate = sum(r["flops"] for r in found[1:]) / s / 1e9
    return {"examples_s": b.spec["batch"] * len(found[1:]) / s, "step_s": median(found, "s"), "memory_gb": gb,
            "gflops": rate, "peak_gflops": peak, "utilisation": rate / peak, "steps": len(found) - 1,
            "data": b.data, "weights": b.weights}


def full_update(b, ddp, optimizer, rollout, step):
    """Seconds of the update that random advantages make: the step's own leaves out groups of equal rewards,
    and the bench is no judge of answers."""
    advantage = torch.randn(len(rollout.tokens), generator=generator(1, step))
    b.model.train()
    return timed(lambda: update(b.run, ddp, None, optimizer, rollout, advantage), b.device)


def reinforced(b):
    """(log-probabilities, their optimizer) of RL steps."""
    b.model.set_trainable(decoder=False)
    log_probs = LogProbs(b.model, latent_grad=b.run.cfg.latent_grad)
    optimizer = make_optimizer(b.model, b.run.cfg)
    set_lr(optimizer, 1e-9, 1.0, 0.0, 1.0)
    return b.run.wrap(log_probs), optimizer


def rl(name, args, seconds=20.0):
    """RL steps, in parts. The reward holds the decoding of right answers' plans. How many are right depends
    on the model: the decoding of all plans, the most that it can be, is timed alone; its share is that of
    rollout, decoding and update."""
    b = Bench(name, args)
    b.to_the_limit()
    Q, G = b.spec["questions"], b.spec["group"]
    # the gradient that is the default for such a model
    b.use(Run(replace(b.cfg, latent_grad="path" if name == "E" else "score"), "rl"))
    ddp, optimizer = reinforced(b)

    def rollout_of(batch, step):
        return b.model.rollout([e.question for e in batch], G, b.noise(Q * G, step), b.cfg.max_answer)

    def work(step):
        batch, b.run.step = b.batch(step, Q), step
        stats = rl_step(b.run, ddp, None, optimizer, batch)
        return stats | {"update_s": full_update(b, ddp, optimizer, rollout_of(batch, step), step)}

    found = rounds(work, seconds, least=2)
    rollout = rollout_of(b.batch(1, Q), 1)
    decode = timed(lambda: b.model.plan_texts(rollout.plan.z, rollout.plan.steps, b.tokenizer), b.device)
    mean = {k: median(found, k) for k in ("rollout_s", "score_s", "update_s")} | {"decode_all_s": decode}
    mean["step_s"] = mean["rollout_s"] + mean["score_s"] + mean["update_s"]
    mean["decode_share"] = decode / (mean["rollout_s"] + decode + mean["update_s"])
    mean["rollouts_s"] = Q * G / mean["step_s"]
    steps = float(rollout.plan.steps.float().mean())
    return {**mean, "memory_gb": b.memory(), "latents": steps * b.spec["c"]}


def evaluation(name, args):
    """Questions a second: greedy answers alone, and evaluate() with plans in words and coherence."""
    b = Bench(name, args)
    b.to_the_limit()
    b.model.eval()
    size = {"S": 64, "T": 256, "E": 512}[name]
    questions = sorted(b.batch(0, size), key=lambda e: len(e.question))
    parts = [[e.question for e in questions[i:i + 128]] for i in range(0, size, 128)]
    greedy = lambda: [b.model.rollout(part) for part in parts]
    one = lambda: [b.model.rollout([e.question]) for e in questions[::size // 8]]
    rows = b.model.rollout([e.question for e in questions[:8]])  # warm
    generation = min(timed(greedy, b.device) for _ in range(2))
    alone = timed(one, b.device) / 8
    whole = timed(lambda: evaluate(b.model, b.tokenizer, questions, 128), b.device)
    return {"generation_q_s": size / generation, "one_at_a_time_q_s": 1 / alone, "evaluate_q_s": size / whole,
            "batching_gain": alone * size / generation, "memory_gb": b.memory(),
            "latents": float(rows.plan.steps.float().mean()) * b.spec["c"],
            "tokens": float(rows.lengths.float().mean())}


def as_published(name, args, seconds=20.0):
    """Examples/s, answers/s and memory of the released code's way."""
    from simcot_released import Published
    b = Bench(name, args)
    theirs, questions = Published(b), b.batch(0, 8)
    theirs.answer(questions[0])
    alone = timed(lambda: [theirs.answer(e) for e in questions], b.device) / len(questions)
    work = lambda step: timed(lambda: theirs.step(b.batch(step, b.spec["batch"])), b.device)
    clock = rounds(work, seconds, least=2)[1:]
    return {"examples_s": b.spec["batch"] * len(clock) / sum(clock), "answers_s": 1 / alone,
            "memory_gb": b.memory(), "steps": len(clock), "peak_gflops": matmul_peak(b.device)}


def losses(rows=2300, d=256, vocab=49152):
    """CPU seconds of the loss of T, forward and backward, twice: ours, and torch's in its own parts."""
    torch.manual_seed(0)
    h, table = torch.randn(rows, d), torch.randn(vocab, d) / 16
    targets, found = torch.randint(vocab, (rows,)), {}
    options = torch.nn.LinearCrossEntropyOptions()

    def ours(h, table):
        model = SimpleNamespace(config=SimpleNamespace(vocab_size=vocab), output_weight=lambda: table,
                                logits=torch.nn.functional.linear)
        return text_loss(model, h, targets)

    def torchs(h, table):
        return torch.nn.functional.linear_cross_entropy(h, table, targets, reduction="sum", options=options)

    for name, loss in (("text_loss", ours), ("linear_cross_entropy", torchs)) * 2:
        leaves = [x.clone().requires_grad_() for x in (h, table)]
        start = time.process_time()
        loss(*leaves).backward()
        found.setdefault(name, []).append(round(time.process_time() - start, 2))
    return found


# --- loading ---

SHAPE_1B = LLaMAConfig(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                       num_attention_heads=32, num_key_value_heads=8, head_dim=64, rope_theta=500000.0,
                       rope_scaling={"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                                     "high_freq_factor": 4.0, "original_max_position_embeddings": 8192})


def write_1b(folder):
    with torch.device("meta"):
        model = LLaMA(SHAPE_1B)
    model = model.bfloat16().to_empty(device="cpu")
    for p in model.parameters():
        p.detach().fill_(1.0) if p.dim() < 2 else p.detach().normal_(std=0.02)
    model.save_pretrained(folder)


def load_1b(folder, dtype):
    """Loading against reading the file's bytes (both from the page cache), memory against the model's own.

    Two ways to read: into one small buffer, which touches no new memory, and into new memory, as a model
    needs it. Pages that a virtual machine touches for the first time are slower still: enough are touched
    before."""
    file, cpu = Path(folder) / "model.safetensors", torch.device("cpu")

    def read():
        with open(file, "rb", buffering=0) as f:
            buffer = bytearray(2**24)
            while f.readinto(buffer):
                pass

    def status(key):
        return int(next(r for r in open("/proc/self/status") if r.startswith(key)).split()[1]) * 1024

    warm = mmap.mmap(-1, 3 * file.stat().st_size)
    for page in range(0, len(warm), mmap.PAGESIZE):
        warm[page] = 1
    warm.close()
    read()
    reading, new = (min(timed(f, cpu) for _ in range(2)) for f in (read, file.read_bytes))
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, models = status("VmRSS"), []
    loading = timed(lambda: models.append(LLaMA.from_pretrained(folder, dtype)), cpu)
    grown = status("VmHWM") - before
    size = sum(p.numel() * p.element_size() for p in models[0].parameters())
    out = {"read_s": reading, "read_new_s": new, "load_s": loading, "load_over_read_new": loading / new,
           "model_gb": size / 1e9, "peak_over_model": grown / size}
    if dtype is torch.float32:
        with torch.no_grad():
            models[0](torch.arange(8)[None])
            out["forward_128_tokens_s"] = timed(lambda: models[0](torch.arange(128)[None]), cpu)
    return out


# --- one process a measurement, and the tables ---

def worker(job, args):
    kind, *rest = job.split(":")
    if kind == "losses":
        return losses()
    if kind == "write1b":
        return write_1b(rest[0]) or {}
    if kind == "load1b":
        return load_1b(rest[0], getattr(torch, rest[1]))
    return {"sft": sft, "rl": rl, "eval": evaluation, "published": as_published}[kind](rest[0], args)


def measure(job, args):
    print(job.split(":/")[0], "...", file=sys.stderr, flush=True)
    flags = [f"--{k}={getattr(args, k)}" for k in ("smollm2", "data_dir", "device", "compile", "threads")]
    command = [sys.executable, __file__, "--worker", job, *flags]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if out.returncode:
        sys.exit(f"bench: {job} failed")
    return json.loads(out.stdout.splitlines()[-1])


def results_of(args):
    """{workload: {measurement: its figures}}."""
    results = {}
    for w in args.workloads:
        if w == "1B":
            with tempfile.TemporaryDirectory() as folder:
                measure(f"write1b:{folder}", args)
                results[w] = {t: measure(f"load1b:{folder}:{t}", args) for t in ("bfloat16", "float32")}
        else:
            kinds = ("sft", "rl", "eval", "published") if w in PUBLISHED else ("sft", "rl", "eval")
            results[w] = {kind: measure(f"{kind}:{w}", args) for kind in kinds}
    return results


def report(results):
    """The tables, as Markdown."""
    number, times = (lambda v: f"{v:.2f}"), (lambda v: f"{v:.2g} x")
    trained = [w for w in ("S", "T", "E") if w in results]
    rows = []
    for w in trained:
        s, e, p = results[w]["sft"], results[w]["eval"], results[w].get("published")
        beside = lambda v, key: [number(v), *((number(p[key]), times(v / p[key])) if p else ("", ""))]
        rows.append([w, *beside(s["examples_s"], "examples_s"), *beside(s["memory_gb"], "memory_gb"),
                     *beside(e["generation_q_s"], "answers_s"), f"{100 * s['utilisation']:.0f} %",
                     number(e["evaluate_q_s"]), times(e["batching_gain"])])
    if trained:
        theirs = ["as published", "ratio"]
        print(markdown(["", "SFT examples/s", *theirs, "peak GB", *theirs, "answers/s", *theirs,
                        "utilisation, SFT", "evaluate questions/s", "batched against one at a time"], rows),
              end="\n\n")
        keys = ("rollout_s", "score_s", "decode_all_s", "update_s", "decode_share", "rollouts_s", "memory_gb")
        rows = [[w, *(number(results[w]["rl"][k]) for k in keys)] for w in trained]
        print(markdown(["RL step", "rollout s", "reward s", "decoding all plans s", "update s",
                        "share of decoding all", "rollouts/s", "peak GB"], rows), end="\n\n")
    if "1B" in results:
        keys = ("read_s", "read_new_s", "load_s", "load_over_read_new", "model_gb", "peak_over_model",
                "forward_128_tokens_s")
        rows = [[t, *(number(r[k]) if k in r else "" for k in keys)] for t, r in results["1B"].items()]
        print(markdown(["1B", "read s", "read into new memory s", "load s", "load / read into new",
                        "model GB", "peak memory / model", "forward, 128 tokens, s"], rows))


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return int(text)


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--workloads", nargs="+", default=["S", "T", "E", "1B"],
                   choices=["S", "T", "E", "1B", "1B-train"])
    p.add_argument("--smollm2", default=os.environ.get("SMOLLM2_DIR", ""),
                   help="SmolLM2-135M, Hugging Face layout")
    folders = [d for d in (ROOT / "data", ROOT.parent / "shared" / "data") if d.is_dir()]
    p.add_argument("--data_dir", default=str(folders[0] if folders else "data"),
                   help="where gsm8k_train.jsonl is")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    p.add_argument("--compile", default="auto", choices=["auto", "yes", "no"])
    p.add_argument("--threads", type=int, default=0)
    p.add_argument("--counts", action="store_true", help="only this")
    p.add_argument("--ratios", action="store_true", help="only this")
    p.add_argument("--signal", metavar="DIR", help="only this, of a checkpoint of --stage vae")
    p.add_argument("--diversity", nargs="+", metavar="DIR",
                   help="only this, of checkpoints trained on the built-in task")
    p.add_argument("--json", metavar="FILE", help="write all figures there")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    group = p.add_argument_group("1B-train")
    group.add_argument("--only", default="sft,rl,eval", help="which parts")
    group.add_argument("--micro", type=positive, nargs="+", default=[256, 128, 64],
                       help="micro-batches of SFT")
    group.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    group.add_argument("--profile", action="store_true", help="print the longest kernels")
    group.add_argument("--tiny", action="store_true", help="a tiny shape, to try it on a CPU")
    return p.parse_args(argv)


def main():
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    if not (args.worker or "").startswith("load1b"):  # its figures are of new memory
        reuse_memory()
    if args.worker:
        print(json.dumps(worker(args.worker, args)))
    elif args.counts:
        import counts
        counts.report(args)
    elif args.ratios:
        import latent_ratios
        latent_ratios.report()
    elif args.signal:
        import gradient_signal
        print(markdown(["latent_grad", "term", "norm", "cosine"], gradient_signal.signal(args.signal)))
    elif args.diversity:
        import gradient_signal
        print(markdown(["", "sampled", "distinct plans of 32", "distinct answers of 32", "pass@1 %",
                        "pass@32 %"], gradient_signal.diversity(args.diversity)))
    else:
        if "1B-train" in args.workloads:  # in this process
            import gpu
            gpu.train_1b(args)
            args.workloads.remove("1B-train")
        results = results_of(args)
        report(results)
        if args.json:
            write_json(args.json, {"torch": torch.__version__, "threads": torch.get_num_threads(),
                                   "published": PUBLISHED, "results": results})


if __name__ == "__main__":
    sys.modules["bench"] = sys.modules[__name__]  # for those that import this file
    main()
