"""Speed and memory: supervised training, reinforcement learning, evaluation, loading.

    python tests/bench.py                                   all workloads (about 15 minutes on 2 cores)
    python tests/bench.py --workloads E T --json bench.json
    python tests/bench.py --signal out/vae                  how much of RL's gradients there is signal (2 minutes)
    python tests/bench.py --diversity out/vae out/rl        how unlike a question's samples are (2 minutes each)

S   SmolLM2-135M's shape, batch 8, up to 4 steps of 2 latents (its real weights and tokenizer from --smollm2 DIR)
T   a small LLaMA with a big vocabulary (256 wide, 4 layers, 49152 tokens), batch 32, up to 8 steps of 2 latents
E   the embedded default of train.py, all latent
1B  Llama-3.2-1B's shape: random weights written in bfloat16, then loaded

Questions: GSM8K's training set, those with 2 to K annotated steps, where --data_dir and --smollm2 have what that
needs, else the built-in task. Rollouts, decoded steps and answers run to their limits, K steps and 16 tokens. Every
measurement is a process of its own (peak memory!), and takes the peak of fp32 matrix products (2048 x 2048) before and
after.

Utilisation = useful FLOPs / s over that peak. Useful FLOPs of a forward pass, per layer and token: 2 x (matrix
parameters of the layer); per layer and pair of a query and a key that it may see: 4 x heads x head_dim; per logit
that a loss reads: 2 d. Plus the heads. Three times that with the backward pass. Padding, logits that nobody
reads and the optimizer count nothing.
"""

import argparse
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import TEST_SETS, Encoded, Tokenizer, builtin_tokenizer, encode_all, is_correct, load  # noqa: E402
from eval import Result, evaluate, find_checkpoint, grouped, markdown, read_state, spread  # noqa: E402
from model import LLaMA, LLaMAConfig, write_json  # noqa: E402
from rl import LogProbs, advantages, answer_texts, plan_texts, score  # noqa: E402
from train import (Config, Run, batch_indices, generator, make_optimizer, reuse_memory, rl_step,  # noqa: E402
                   supervised_step, update)
from vae import END, METHODS, START, LatentConfig, LatentReasoner, Noise, remaining_text  # noqa: E402

WORKLOADS = {  # shape, then K, c, batch, questions x group of an RL step, rows of a micro-batch
    "S": dict(shape=(576, 1536, 30, 9, 3), vocab=49152, K=4, c=2, batch=8, questions=4, group=8, micro=8),
    "T": dict(shape=(256, 688, 4, 4, 4), vocab=49152, K=8, c=2, batch=32, questions=16, group=8, micro=32),
    "E": dict(shape=(96, 256, 4, 4, 4), vocab=0, K=6, c=1, batch=32, questions=64, group=8, micro=128),
}
# The released SIM-CoT code itself (its class, transformers 4.46, the same weights, data, batch, AdamW, fp32), measured
# apart, on 2 cores whose peak was 100 GFLOP/s: examples/s, GB at most, answers/s. `as_published` is measured here.
PUBLISHED = {"S": dict(examples_s=0.31, memory_gb=8.7, answers_s=0.29),
             "T": dict(examples_s=0.69, memory_gb=6.8, answers_s=0.77)}


# --- what is measured ---

def matmul_peak(device, seconds=0.5):
    """GFLOP/s of fp32 matrix products, the best of several."""
    a = torch.randn(2048, 2048, device=device)
    best, end = 0.0, time.time() + seconds
    a @ a
    while time.time() < end:
        best = max(best, 2 * 2048**3 / timed(lambda: a @ a, device) / 1e9)
    return best


def timed(f, device):
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    sync()
    start = time.time()
    f()
    sync()
    return time.time() - start


class Bench:
    """Model, data and Run of a workload."""

    def __init__(self, name, args, steps=None, **changes):
        self.spec = spec = WORKLOADS[name] | changes
        d, ff, layers, heads, kv = spec["shape"]
        cfg = Config(stage="vae", hidden_size=d, intermediate_size=ff, layers=layers, heads=heads, context=512,
                     thoughts_per_step=spec["c"], max_steps=spec["K"], batch_size=spec["batch"],
                     micro_batch=spec["micro"], questions_per_step=spec["questions"], group=spec["group"],
                     minibatch=spec["questions"] * spec["group"], device=args.device, compile=args.compile)
        self.run = Run(cfg, "bench")
        self.device = self.run.device
        real = name != "E" and args.smollm2 and Path(args.smollm2).is_dir()
        tokenizer = Tokenizer.from_pretrained(args.smollm2) if real else builtin_tokenizer()
        tokenizer.add_special(START, END)
        gsm8k = real and (Path(args.data_dir) / "gsm8k_train.jsonl").is_file()
        self.data = "gsm8k" if gsm8k else "built-in"
        examples = load("gsm8k", "train", args.data_dir) if gsm8k else load("builtin", "train")
        encoded, _ = encode_all(examples[:4000], tokenizer, 512)
        if steps is None:
            self.examples = [e for e in encoded if 2 <= len(e.steps) <= spec["K"]]
        else:  # growth: the steps of each question over and over, to just so many
            self.examples = [Encoded(e.question, [e.steps[i % len(e.steps)] for i in range(steps)], e.answer, e.example)
                             for e in encoded if e.steps]
        if name == "S" and real:
            policy, self.weights = LLaMA.from_pretrained(args.smollm2), "SmolLM2-135M"
        else:
            torch.manual_seed(0)
            policy, self.weights = LLaMA(LLaMAConfig(spec["vocab"] or tokenizer.vocab_size, d, ff, layers, heads, kv,
                                                     d // heads)), "random"
        start, end = tokenizer.token_id(START), tokenizer.token_id(END)
        policy.add_tokens([start, end])
        config = LatentConfig(**METHODS["atp"], method="atp", thoughts_per_step=spec["c"], max_steps=spec["K"],
                              start_id=start, end_id=end, eos_id=tokenizer.eos_id)
        self.tokenizer, self.model = tokenizer, LatentReasoner(policy, config).to(self.device)

    def to_the_limit(self):
        """From now on no plan and no text ends before its limit: the worst case, and the same work for everybody."""
        with torch.no_grad():
            self.model.stop_head[-1].bias.copy_(torch.tensor([1e3, -1e3]))
        self.model.config.eos_id = -1

    def memory(self):
        """Peak so far, GB."""
        return self.run.memory_gb() * 2**30 / 1e9

    def batch(self, step, size):
        return [self.examples[i] for i in batch_indices(0, step, len(self.examples), size)]

    def useful_flops(self, examples):
        """Of one supervised step, all latent (see the top of this file)."""
        c, d = self.spec["c"], self.model.policy.config.hidden_size
        total = 0.0
        for e in examples:
            n, rest = len(e.steps), len(remaining_text(e, self.model.config, self.spec["K"]))
            tokens = len(e.question) + 1 + n * c + rest
            total += forward_flops(self.model.policy.config, tokens, rest)
            for k in range(n):
                words = sum(map(len, e.steps[k:])) if k == self.spec["K"] - 1 else len(e.steps[k])
                total += forward_flops(self.model.decoder.config, c + words, words + 1)
            total += 2 * (4 * d * d * (n * c + 1) + d * d * (n + 1))  # latent head, stop head
        return 3 * total


def forward_flops(config, tokens, logits):
    d, width = config.hidden_size, config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    matrices = d * (width + 2 * kv) + width * d + 3 * d * config.intermediate_size
    pairs = tokens * (tokens + 1) / 2
    return config.num_hidden_layers * (2 * matrices * tokens + 4 * width * pairs) + 2 * d * config.vocab_size * logits


def sft(name, args, steps=None, seconds=20.0, **changes):
    """Supervised steps, all latent: forward, backward, clip, AdamW."""
    b = Bench(name, args, steps, **changes)
    b.model.set_trainable(b.spec["K"])
    b.model.train()
    optimizer = make_optimizer(b.model, b.run.cfg, b.run.cfg.weight_decay)
    ddp = b.run.wrap(b.model, b.model)
    size, clock, flops = b.spec["batch"], [], []
    peaks = [matmul_peak(b.device)]
    end = None
    for step in range(1, 10_000):
        batch = b.batch(step, size)
        clock.append(timed(lambda: supervised_step(b.run, ddp, optimizer, batch, b.spec["K"], step, 1e-6), b.device))
        flops.append(b.useful_flops(batch))
        end = end or time.time() + seconds  # the first step also pays for allocations and, on a GPU, compilation
        if time.time() > end and len(clock) > 3:
            break
    gb = b.memory()
    peaks.append(matmul_peak(b.device))
    rate = sum(flops[1:]) / sum(clock[1:]) / 1e9
    return {"examples_s": size * len(clock[1:]) / sum(clock[1:]), "step_s": float(np.median(clock[1:])),
            "memory_gb": gb, "gflops": rate, "peak_gflops": max(peaks), "utilisation": rate / max(peaks),
            "steps": len(clock) - 1, "data": b.data, "weights": b.weights}


def rl(name, args, seconds=20.0, **changes):
    """RL steps, in parts. The reward holds the decoding of right answers' plans. How many are right depends on the
    model: the decoding of all plans, the most that it can be, is timed alone; its share is that of rollout, decoding
    and update."""
    b = Bench(name, args, **changes)
    b.to_the_limit()
    model, Q, G = b.model, b.spec["questions"], b.spec["group"]
    model.set_trainable("rl")
    optimizer = make_optimizer(model, b.run.cfg)
    log_probs = LogProbs(model, latent_grad="path" if name == "E" else "score")  # as by default
    ddp = b.run.wrap(log_probs, model)
    times, end = [], None
    for step in range(1, 10_000):
        batch = b.batch(step, Q)
        stats = rl_step(b.run, ddp, None, optimizer, batch, b.tokenizer, step, 1e-9)
        times.append(stats | full_update(b, ddp, optimizer, batch, step))
        end = end or time.time() + seconds
        if time.time() > end and len(times) > 2:
            break
    rollout = model.rollout([e.question for e in batch], G, noise_of(b, Q * G, 1))
    decode = timed(lambda: model.decode_steps(rollout.z, rollout.steps), b.device)
    mean = {k: float(np.median([t[k] for t in times[1:]])) for k in ("rollout_s", "score_s", "update_s")}
    mean["decode_all_s"] = decode
    mean["step_s"] = mean["rollout_s"] + mean["score_s"] + mean["update_s"]
    mean["decode_share"] = decode / (mean["rollout_s"] + decode + mean["update_s"])
    mean["rollouts_s"] = Q * G / mean["step_s"]
    return {**mean, "memory_gb": b.memory(), "latents": float(rollout.steps.float().mean()) * b.spec["c"]}


def noise_of(b, rows, step):
    return Noise.draw(rows, b.model.config, b.model.policy.config.hidden_size, b.run.cfg.max_answer, generator(0, step))


def full_update(b, ddp, optimizer, batch, step):
    """The update that random advantages make: the step's own leaves out groups of equal rewards, and the bench is no
    judge of answers."""
    Q, G = b.spec["questions"], b.spec["group"]
    rollout = b.model.rollout([e.question for e in batch], G, noise_of(b, Q * G, step), b.run.cfg.max_answer)
    advantage = torch.randn(Q * G, generator=generator(1, step)).to(b.device)
    b.model.train()
    work = lambda: update(b.run, ddp, None, optimizer, rollout, advantage, 1e-9, step, [])
    return {"update_s": timed(work, b.device)}


def evaluation(name, args):
    """Questions a second: greedy answers alone, and evaluate() with plans in words and coherence."""
    b = Bench(name, args)
    b.to_the_limit()
    b.model.eval()
    size = {"S": 64, "T": 256, "E": 512}[name]
    questions = sorted(b.batch(0, size), key=lambda e: len(e.question))
    greedy = lambda: [b.model.rollout([e.question for e in questions[i:i + 128]]) for i in range(0, size, 128)]
    one = lambda: [b.model.rollout([e.question]) for e in questions[::size // 8]]
    rows = b.model.rollout([e.question for e in questions[:8]])  # warm
    generation = min(timed(greedy, b.device) for _ in range(2))
    alone = timed(one, b.device) / 8
    whole = timed(lambda: evaluate(b.model, b.tokenizer, questions, 128), b.device)
    return {"generation_q_s": size / generation, "one_at_a_time_q_s": 1 / alone, "evaluate_q_s": size / whole,
            "batching_gain": alone * size / generation, "memory_gb": b.memory(),
            "latents": float(rows.steps.float().mean()) * b.spec["c"], "tokens": float(rows.lengths.float().mean())}


def as_published(name, args, seconds=20.0):
    """The same work as the released SIM-CoT code does it (InternLM/SIM-CoT, Coconut/coconut.py), with transformers' LLaMA
    of today: K x c latents for every row, hidden states fed back; the embeddings cut into single vectors and put together
    again at every latent; logits over the vocabulary at all positions, of the question too; a pass of the decoder a step,
    padded; plain AdamW; answers one question at a time, the whole sequence read once more before the first word. Ours
    does more besides: heads, sampling, the KL term, a decision to stop."""
    from transformers import LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    b = Bench(name, args)
    K, c, size = b.spec["K"], b.spec["c"], b.spec["batch"]
    start_id, end_id, eos = b.tokenizer.token_id(START), b.tokenizer.token_id(END), b.tokenizer.eos_id
    with tempfile.TemporaryDirectory() as folder:
        b.model.policy.save_pretrained(folder)
        b.model = None
        policy, decoder = (LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(b.device) for _ in range(2))
    embed = policy.get_input_embeddings()

    def padded(rows, value=0, left=False):
        width = max(map(len, rows))
        rows = [[value] * (width - len(r)) * left + r + [value] * (width - len(r)) * (not left) for r in rows]
        return torch.tensor(rows, device=b.device)

    def think(questions, texts):
        """embeds with the latents filled in, logits at all positions, place of the first latent."""
        asked = padded([q + [start_id] for q in questions], -1, left=True)
        ids = torch.cat((asked, asked.new_zeros(len(asked), K * c), padded(texts, -1)), dim=1)
        mask, P = (ids >= 0).long(), asked.shape[1]
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)
        embeds, cache, logits, start = embed(ids.clamp(min=0)), None, [], 0
        for end in range(P, P + K * c + 1):
            end = ids.shape[1] if end == P + K * c else end
            out = policy(inputs_embeds=embeds[:, start:end], attention_mask=mask[:, :end], use_cache=True,
                         position_ids=places[:, start:end], past_key_values=cache, output_hidden_states=True)
            cache, start = out.past_key_values, end
            logits.append(out.logits)
            if end < ids.shape[1]:
                rows = [[embeds[i, t] for t in range(embeds.shape[1])] for i in range(len(embeds))]
                for i, row in enumerate(rows):
                    row[end] = out.hidden_states[-1][i, -1]
                embeds = torch.stack([torch.stack(row) for row in rows])
        return embeds, torch.cat(logits, dim=1), P

    def loss_of(logits, labels):
        return F.cross_entropy(logits[:, :-1].contiguous().flatten(0, 1), labels[:, 1:].flatten())

    def step(examples):
        embeds, logits, P = think([e.question for e in examples], [[end_id] + e.answer for e in examples])
        answers = padded([e.answer for e in examples], -100)
        loss = loss_of(logits, F.pad(answers, (P + K * c + 1, 0), value=-100))
        for k in range(K):
            # a row without so many steps writes its answer again
            texts = [sum(e.steps[k:None if k == K - 1 else k + 1], []) or e.answer[:-1] for e in examples]
            labels = padded([[-100] * c + t + [eos] for t in texts], -100)
            inputs = torch.cat((embeds[:, P + k * c:P + (k + 1) * c], embed(labels[:, c:].clamp(min=0))), dim=1)
            mask = F.pad(labels[:, c:] >= 0, (c, 0), value=True).long()
            place = torch.arange(1, labels.shape[1] + 1, device=b.device).expand(len(labels), -1)
            out = decoder(inputs_embeds=inputs, attention_mask=mask, position_ids=place, output_hidden_states=True)
            loss = loss + loss_of(out.logits, labels) / K
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*policy.parameters(), *decoder.parameters()], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def answer(e):
        embeds, *_ = think([e.question], [[end_id]])
        out = policy(inputs_embeds=embeds, use_cache=True)
        for _ in range(15):
            token = out.logits[:, -1].argmax(dim=-1)
            out = policy(inputs_embeds=embed(token)[:, None], past_key_values=out.past_key_values, use_cache=True)

    questions = b.batch(0, 8)
    answer(questions[0])
    alone = timed(lambda: [answer(e) for e in questions], b.device) / len(questions)
    optimizer = torch.optim.AdamW([*policy.parameters(), *decoder.parameters()], lr=1e-6)
    clock, end = [], None
    while len(clock) < 3 or time.time() < end:
        batch = b.batch(len(clock) + 1, size)
        clock.append(timed(lambda: step(batch), b.device))
        end = end or time.time() + seconds
    return {"examples_s": size * len(clock[1:]) / sum(clock[1:]), "answers_s": 1 / alone, "memory_gb": b.memory(),
            "steps": len(clock) - 1, "peak_gflops": matmul_peak(b.device)}


def growth(name, args):
    """Seconds an example as latents double, and seconds an RL step as the group does."""
    latents = {}
    for n in (4, 8, 16, 32):
        steps = n // WORKLOADS[name]["c"]
        latents[n] = 1 / sft(name, args, steps, seconds=6.0, K=steps, batch=8)["examples_s"]
    group = {}
    for g in (4, 8, 16):
        out = rl(name, args, seconds=6.0, group=g, questions=4)
        group[g] = out["rollout_s"] + out["update_s"]
    return {"example_s": latents, "rl_step_s": group}


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

    Two ways to read: into one small buffer, which touches no new memory, and into new memory, as a model needs it.
    Pages that a virtual machine touches for the first time are slower still: enough of them are touched before."""
    file = Path(folder) / "model.safetensors"

    def read():
        with open(file, "rb", buffering=0) as f:
            buffer = bytearray(2**24)
            while f.readinto(buffer):
                pass

    cpu = torch.device("cpu")
    warm = mmap.mmap(-1, 3 * file.stat().st_size)
    for page in range(0, len(warm), mmap.PAGESIZE):
        warm[page] = 1
    warm.close()
    read()
    reading = min(timed(read, cpu) for _ in range(2))
    new = min(timed(file.read_bytes, cpu) for _ in range(2))
    status = lambda key: int(next(r for r in open("/proc/self/status") if r.startswith(key)).split()[1]) * 1024
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, models = status("VmRSS"), []
    loading = timed(lambda: models.append(LLaMA.from_pretrained(folder, dtype)), cpu)
    grown = status("VmHWM") - before
    size = sum(p.numel() * p.element_size() for p in models[0].parameters())
    out = {"read_s": reading, "read_new_s": new, "load_s": loading, "load_over_read": loading / reading,
           "load_over_read_new": loading / new, "model_gb": size / 1e9,
           "peak_over_model": grown / size}
    if dtype is torch.float32:
        with torch.no_grad():
            models[0](torch.arange(8)[None])
            out["forward_128_tokens_s"] = timed(lambda: models[0](torch.arange(128)[None]), cpu)
    return out


def signal(path, questions=512, group=8):
    """Rows (gradient, term, norm, cosine) of two independent estimates of the policy gradient of a checkpoint, each
    from questions x group rollouts of its training questions, rewarded as in training, advantages divided by the group's
    deviation. No figure of speed."""
    ckpt = find_checkpoint(path)
    cfg = read_state(ckpt)["config"]
    model, tokenizer = LatentReasoner.from_pretrained(ckpt), Tokenizer.from_pretrained(ckpt)
    if not model.config.vae:
        sys.exit(f"--signal {path}: its latents are not sampled, so score has no gradient of them")
    model.set_trainable("rl")
    context = model.policy.config.max_position_embeddings
    train, _ = encode_all(load(cfg["data"], "train", cfg["data_dir"]), tokenizer, context)
    params = [p for p in model.parameters() if p.requires_grad]

    def estimate(seed):
        total = {}
        for i in range(0, questions, 64):
            part = [train[j] for j in batch_indices(seed, i // 64, len(train), 64)]
            noise = Noise.draw(64 * group, model.config, model.policy.config.hidden_size, 16, generator(seed, i))
            rollout = model.rollout([e.question for e in part], group, noise)
            weights = cfg["w_acc"], cfg["w_fmt"], cfg["w_coh"]
            result = score(model, rollout, [e.example for e in part], tokenizer, *weights)
            a = advantages(result.reward, group)[:, None] / (questions * group)
            for grad in ("score", "path"):
                latent, stop, token, *_ = LogProbs(model, latent_grad=grad)(rollout)
                for term, logp, n in (("answer", token, rollout.lengths), ("stop", stop, rollout.steps + rollout.stopped),
                                      ("latent", latent, rollout.steps * model.config.thoughts_per_step)):
                    if logp is None:
                        continue
                    logp = logp.flatten(1)
                    g = torch.autograd.grad((a * logp / n.clamp(min=1)[:, None]).sum(), params, retain_graph=True,
                                            allow_unused=True)
                    g = torch.cat([torch.zeros(p.numel()) if v is None else v.flatten() for v, p in zip(g, params)])
                    total[grad, term] = total.get((grad, term), 0.0) + g
        return total

    one, two = estimate(1), estimate(2)
    return [(*key, float(one[key].norm()), float(torch.cosine_similarity(one[key], two[key], dim=0))) for key in one]


def diversity(paths, samples=32, limit=100):
    """Rows (configuration, what is sampled, ...) of how unlike the samples of a question are: distinct plans in the
    decoder's words, distinct answers, pass@1 and pass@`samples`, over the first `limit` questions of each built-in test
    set; mean and deviation over seeds. A stop head's decisions are sampled throughout."""
    questions, found = [e for name in TEST_SETS for e in load(name, "test")[:limit]], {}
    groups = grouped([Result(ckpt, read_state(ckpt)) for ckpt in map(find_checkpoint, paths)])
    for label, ckpt in [(g.label, r.ckpt) for g in groups for r in g.results]:
        model, tokenizer = LatentReasoner.from_pretrained(ckpt).eval(), Tokenizer.from_pretrained(ckpt)
        encoded, _ = encode_all(questions, tokenizer, model.policy.config.max_position_embeddings)
        noise = Noise.draw(len(encoded) * samples, model.config, model.policy.config.hidden_size, 16, generator(0))
        ways = {"answers": (1, 0)}  # temperatures of answers and latents
        if model.config.vae:
            ways |= {"latents": (0, 1), "both": (1, 1), "latents, 3 sigma": (0, 3), "both, 3 sigma": (1, 3)}
        for way, temperatures in ways.items():
            sums = np.zeros(4)
            for i in range(0, len(encoded), 16):
                part = encoded[i:i + 16]
                rows = noise[i * samples:(i + len(part)) * samples]
                rollout = model.rollout([e.question for e in part], samples, rows, 16, *temperatures)
                texts, _ = answer_texts(rollout, tokenizer, model.config.eos_id)
                plans = plan_texts(model, rollout.z, rollout.steps, tokenizer) if model.config.decode else [()] * len(texts)
                for j, e in enumerate(part):
                    own = slice(j * samples, (j + 1) * samples)
                    right = sum(is_correct(t, e.example) for t in texts[own])
                    sums += len(set(map(tuple, plans[own]))), len(set(texts[own])), right / samples, right > 0
            found.setdefault((label, way), []).append(sums / len(encoded))
    return [[*key, *(spread([f[j] for f in all], scale, 1) for j, scale in enumerate((1, 1, 100, 100)))]
            for key, all in found.items()]


# --- one process a measurement, and the tables ---

def worker(job, args):
    kind, *rest = job.split(":")
    if kind == "write1b":
        return write_1b(rest[0]) or {}
    if kind == "load1b":
        return load_1b(rest[0], getattr(torch, rest[1]))
    return {"sft": sft, "rl": rl, "eval": evaluation, "growth": growth, "published": as_published}[kind](rest[0], args)


def measure(job, args):
    print(job.split(":/")[0], "...", file=sys.stderr, flush=True)
    own = ("smollm2", "data_dir", "device", "compile", "threads")
    flags = [f"--{k}={v}" for k, v in vars(args).items() if k in own]
    out = subprocess.run([sys.executable, __file__, "--worker", job, *flags], stdout=subprocess.PIPE, text=True)
    if out.returncode:
        sys.exit(f"bench: {job} failed")
    return json.loads(out.stdout.splitlines()[-1])


def report(results):
    """The tables, as Markdown."""
    f, x = (lambda v, n=2: f"{v:.{n}f}"), (lambda v: f"{v:.2g} x" if v < 10 else f"{v:.0f} x")
    rows = []
    for w in (w for w in WORKLOADS if w in results):
        s, e, p = results[w]["sft"], results[w]["eval"], results[w].get("published")
        both = lambda v, key, n: [f(v, n), *((f(p[key], 2), x(v / p[key])) if p else ("", ""))]
        rows.append([w, *both(s["examples_s"], "examples_s", 2), *both(s["memory_gb"], "memory_gb", 1),
                     *both(e["generation_q_s"], "answers_s", 1), f"{100 * s['utilisation']:.0f} %",
                     f(e["evaluate_q_s"], 1), x(e["batching_gain"])])
    if rows:
        print(markdown(["", "SFT examples/s", "as published", "ratio", "peak GB", "as published", "ratio", "answers/s",
                        "as published", "ratio", "utilisation, SFT", "evaluate questions/s",
                        "batched against one at a time"], rows), end="\n\n")
    rows = [[w, f(r["rollout_s"]), f(r["score_s"]), f(r["decode_all_s"]), f(r["update_s"]),
             f"{100 * r['decode_share']:.0f} %", f(r["rollouts_s"], 1), f(r["memory_gb"], 1)]
            for w, r in ((w, results[w]["rl"]) for w in WORKLOADS if w in results)]
    if rows:
        print(markdown(["RL step", "rollout s", "reward s", "decoding all plans s", "update s", "share of decoding all",
                        "rollouts/s", "peak GB"], rows), end="\n\n")
    for w in (w for w in WORKLOADS if "growth" in results.get(w, {})):
        g = results[w]["growth"]
        for key, label in (("example_s", "seconds an example, latents"), ("rl_step_s", "seconds an RL step, group")):
            print(markdown([f"{w}: {label}", *g[key]], [["", *(f(v, 3) for v in g[key].values())]]), end="\n\n")
    if "1B" in results:
        rows = [[k, f(r["read_s"]), f(r["read_new_s"]), f(r["load_s"]), x(r["load_over_read_new"]), f(r["model_gb"]),
                 x(r["peak_over_model"]), f(r["forward_128_tokens_s"]) if "forward_128_tokens_s" in r else ""]
                for k, r in results["1B"].items()]
        print(markdown(["1B", "read s", "read into new memory s", "load s", "load / read into new", "model GB",
                        "peak memory / model", "forward, 128 tokens, s"], rows))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--workloads", nargs="+", default=["S", "T", "E", "1B"], choices=["S", "T", "E", "1B"])
    p.add_argument("--no-growth", action="store_true", help="leave out time against latents and group size")
    p.add_argument("--smollm2", default=os.environ.get("SMOLLM2_DIR", ""), help="SmolLM2-135M, Hugging Face layout")
    p.add_argument("--data_dir", default=str(next((d for d in (ROOT / "data", ROOT.parent / "shared" / "data")
                                                   if d.is_dir()), "data")), help="where gsm8k_train.jsonl is")
    p.add_argument("--device", default="auto")
    p.add_argument("--compile", default="auto")
    p.add_argument("--threads", type=int, default=0)
    p.add_argument("--signal", metavar="DIR", help="only this, of a checkpoint of --stage vae")
    p.add_argument("--diversity", nargs="+", metavar="DIR", help="only this, of checkpoints trained on the built-in task")
    p.add_argument("--json", metavar="FILE", help="write all figures there")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.worker:
        if not args.worker.startswith("load1b"):  # its figures are of new memory
            reuse_memory()
        print(json.dumps(worker(args.worker, args)))
        return
    if args.signal:
        print(markdown(["latent_grad", "term", "norm", "cosine"],
                       [[grad, term, f"{norm:.3g}", f"{cos:.3f}"] for grad, term, norm, cos in signal(args.signal)]))
        return
    if args.diversity:
        print(markdown(["", "sampled", "distinct plans of 32", "distinct answers of 32", "pass@1 %", "pass@32 %"],
                       diversity(args.diversity)))
        return
    results = {}
    for w in args.workloads:
        if w == "1B":
            with tempfile.TemporaryDirectory() as folder:
                measure(f"write1b:{folder}", args)
                results[w] = {t: measure(f"load1b:{folder}:{t}", args) for t in ("bfloat16", "float32")}
            continue
        kinds = ("sft", "rl", "eval", "published") if w in PUBLISHED else ("sft", "rl", "eval")
        results[w] = {kind: measure(f"{kind}:{w}", args) for kind in kinds}
        if w != "S" and not args.no_growth:
            results[w]["growth"] = measure(f"growth:{w}", args)
    report(results)
    if args.json:
        write_json(args.json, {"torch": torch.__version__, "threads": torch.get_num_threads(),
                               "published": PUBLISHED, "results": results})


if __name__ == "__main__":
    main()
