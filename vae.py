"""The latent reasoner: a LLaMA that thinks in sampled latent tokens, seen as a conditional VAE.

    question  <|start-latent|>  z z | z z | z z  <|end-latent|>  ### answer  <eos>
                                step1 step2 step3

The policy's own reasoning pass is the encoder: from the hidden state before it, each latent is drawn
from N(mu, sigma^2) and fed back as the next input embedding. The decoder, a second LLaMA, reads the
latents of one step and writes that step in words. The stop head looks at the first latent of a step.
SIM-CoT, Coconut, CoT and No-CoT are the same code with parts switched off (METHODS below).

One loop, `LatentReasoner.think`, serves training (with gradients through the whole chain) and rollouts.
"""

import copy
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from reprlib import repr as short

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

from model import FLOATS, LLaMA, KVCache, first, read_json, save_tensors, tensor_headers, write_json

METHODS = {  # paper, section 4: the baselines are parts switched off
    "atp":     dict(latent=True, head=True, vae=True, stop=True, decode=True),
    "simcot":  dict(latent=True, head=False, vae=False, stop=False, decode=True),
    "coconut": dict(latent=True, head=False, vae=False, stop=False, decode=False),
    "cot":     dict(latent=False, head=False, vae=False, stop=False, decode=False),
    "nocot":   dict(latent=False, head=False, vae=False, stop=False, decode=False),
}
START, END = "<|start-latent|>", "<|end-latent|>"


@dataclass
class LatentConfig:
    method: str
    latent: bool  # think in latents, else in text (cot) or not at all (nocot)
    head: bool    # a latent head makes z from h, else h itself is fed back
    vae: bool     # z is sampled and there is a KL term, else z = mu
    stop: bool    # a stop head ends the plan, else every question gets max_steps steps
    decode: bool  # a decoder must write each step from its latents
    thoughts_per_step: int
    max_steps: int
    start_id: int  # <|start-latent|>
    end_id: int    # <|end-latent|>
    eos_id: int

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if type(value) is not {"bool": bool, "int": int, "str": str}[getattr(f.type, "__name__", f.type)]:
                raise ValueError(f"{f.name} is {short(value)}")
        if self.method not in METHODS or self.thoughts_per_step < 1 or self.max_steps < 1:
            raise ValueError(f"method {short(self.method)}, thoughts_per_step {self.thoughts_per_step}, "
                             f"max_steps {self.max_steps}")
        if self.vae > self.head or max(self.head, self.stop, self.decode) > self.latent:
            raise ValueError("vae needs head; head, stop and decode need latent")

    def latent_steps(self, example, stage):
        """How many steps of `example` are latent at curriculum stage `stage` (paper, section 3)."""
        if not self.latent:
            return 0
        n = min(stage, self.max_steps)
        return min(n, len(example.steps)) if self.stop else n


class LatentHead(nn.Module):
    """h (.., d) -> mu, logvar (.., d)."""

    def __init__(self, d):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, d), nn.LayerNorm(d))
        self.mu, self.logvar = nn.Linear(d, d), nn.Linear(d, d)
        # start nearly deterministic, so that the chain of latents can be learned at all; the KL term then
        # widens sigma as far as the other losses bear it
        nn.init.zeros_(self.logvar.weight)
        nn.init.constant_(self.logvar.bias, 2 * math.log(0.1))

    def forward(self, h):
        h = self.trunk(h)
        return precise(self.mu(h)), precise(self.logvar(h)).clamp(-12, 6)


def precise(x):
    """At least fp32: what is exponentiated or summed must not stay bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gaussian_logp(z, mu, logvar):
    """log N(z; mu, exp(logvar)) summed over the last dimension."""
    return -0.5 * ((z - mu) ** 2 * torch.exp(-logvar) + logvar + math.log(2 * math.pi)).sum(dim=-1)


def widened(logvar, temperature):
    """log variance of what is sampled with `temperature` times sigma (0: greedy, of which there is no density)."""
    return logvar + 2 * math.log(temperature or 1)


def gaussian_kl(mu, logvar):
    """KL(N(mu, exp(logvar)) || N(0, 1)), mean over the last dimension."""
    return 0.5 * (mu**2 + logvar.exp() - logvar - 1).mean(dim=-1)


def pad(rows, value=0):
    """Right-padded int64 tensor (B, T) of lists of ids, and its bool mask of what is no padding."""
    width = max(1, max(map(len, rows)))
    out = torch.tensor([r + [value] * (width - len(r)) for r in rows])
    return out, first(torch.tensor([len(r) for r in rows]), width)


# --- batches ---

@dataclass
class Batch:
    """One micro-batch of the supervised stage. Every weight is that of a term in the loss of the global
    batch, so that losses and gradients of micro-batches and processes add up to it."""

    prefix: torch.Tensor         # (B, S) question and <|start-latent|>; text methods: question and text
    prefix_valid: torch.Tensor   # (B, S) bool
    text: torch.Tensor           # (B, T) <|end-latent|>, remaining steps, answer; text methods: = prefix
    text_valid: torch.Tensor     # (B, T)
    targets: torch.Tensor        # (B, T) next token, -100 where none is asked for
    token_weight: float          # 1 / target tokens of the global batch
    steps: torch.Tensor          # (B,) latent steps
    max_steps: int               # of the batch
    step_weight: torch.Tensor    # (B, N) 1 / (steps of the row x examples of the global batch), 0 past its steps
    stop_targets: torch.Tensor   # (B, N + 1) 0 continue, 1 stop
    stop_weight: torch.Tensor    # (B, N + 1) likewise
    decode: torch.Tensor         # (M, U) text of every latent step of the batch
    decode_index: tuple          # (M,) row, (M,) step
    decode_weight: torch.Tensor  # (M, U) weight of writing that token
    noise: torch.Tensor | None = None  # (B, N, c, d) of the latents

    def to(self, device):
        move = lambda v: v.to(device, non_blocking=True) if torch.is_tensor(v) else v
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: tuple(map(move, v)) if isinstance(v, tuple) else move(v) for k, v in values.items()})


def remaining_text(example, config, stage):
    """Token ids after the latents: the steps that are still text, and the answer."""
    n = config.latent_steps(example, stage)
    # where all allowed steps are latent, the last one stands for all the rest
    rest = [] if config.method == "nocot" or (config.latent and stage >= config.max_steps) else example.steps[n:]
    return [t for step in rest for t in step] + example.answer


def target_tokens(examples, config, stage):
    return sum(len(remaining_text(e, config, stage)) for e in examples)


def collate(examples, config, stage, noise=None, total_examples=None, total_tokens=None):
    """A Batch of data.Encoded examples at curriculum stage `stage` (0: all text). `noise` (B, K, c, d).
    total_*: of the global batch of which this is a part (default: it is the whole)."""
    examples = list(examples)
    B = total_examples or len(examples)
    n = [config.latent_steps(e, stage) for e in examples]
    N = max(n)
    rest = [remaining_text(e, config, stage) for e in examples]
    if N:
        prefix, prefix_valid = pad([e.question + [config.start_id] for e in examples])
        text, text_valid = pad([[config.end_id] + r[:-1] for r in rest])
        targets, _ = pad(rest, -100)
    else:
        prefix, prefix_valid = pad([e.question + r[:-1] for e, r in zip(examples, rest)])
        text, text_valid = prefix, prefix_valid
        targets, _ = pad([[-100] * (len(e.question) - 1) + r for e, r in zip(examples, rest)], -100)
    steps = torch.tensor(n)
    k = torch.arange(N + 1)
    step_weight = (k[:N] < steps[:, None]) / steps[:, None].clamp(min=1) / B
    ends = torch.tensor([m == len(e.steps) and m < config.max_steps for m, e in zip(n, examples)])
    asked = (k < steps[:, None]) | ((k == steps[:, None]) & ends[:, None])
    stop_weight = asked / asked.sum(1, keepdim=True).clamp(min=1) / B
    # what each latent step must decode to; latents beyond the example's steps (no stop head) stand for nothing
    rows, index, texts, weights = [], [], [], []
    for row, (e, m) in enumerate(zip(examples, n)):
        m = min(m, len(e.steps))
        for i in range(m):
            last = i == config.max_steps - 1
            rows.append(row)
            index.append(i)
            texts.append([t for s in e.steps[i:None if last else i + 1] for t in s] + [config.eos_id])
            weights.append(1 / (len(texts[-1]) * m * B))
    decode, decode_valid = (t[:len(texts)] for t in pad(texts or [[]]))
    return Batch(prefix, prefix_valid, text, text_valid, targets, 1 / (total_tokens or sum(map(len, rest))),
                 steps, N, step_weight, (k == steps[:, None]).long(), stop_weight, decode,
                 (torch.tensor(rows, dtype=torch.long), torch.tensor(index, dtype=torch.long)),
                 decode_valid * torch.tensor(weights)[:, None],
                 None if noise is None else noise[:, :N + 1])


@dataclass
class Noise:
    """All randomness of a set of rollouts. It is drawn for the global batch and cut by rows, so that
    samples depend neither on the number of processes nor on how the batch is split."""

    latent: torch.Tensor  # (B, K, c, d) standard normal
    stop: torch.Tensor    # (B, K) uniform
    answer: torch.Tensor  # (B, A) uniform

    @classmethod
    def draw(cls, rows, config, d, max_tokens, generator):
        K, c = (config.max_steps, config.thoughts_per_step) if config.latent else (0, 0)
        return cls(torch.randn(rows, K, c, d, generator=generator), torch.rand(rows, K, generator=generator),
                   torch.rand(rows, max_tokens, generator=generator))

    def __getitem__(self, rows):
        return Noise(self.latent[rows], self.stop[rows], self.answer[rows])

    def to(self, device):
        return Noise(self.latent.to(device), self.stop.to(device), self.answer.to(device))


@dataclass
class Thought:
    """A batch of latent plans of up to N steps. Rows: 0 .. steps - 1 of N are theirs."""

    z: torch.Tensor            # (B, N, c, d) as fed to the policy
    mu: torch.Tensor           # (B, N, c, d)
    logvar: torch.Tensor | None
    steps: torch.Tensor        # (B,)
    stop_logits: torch.Tensor | None  # (B, N + 1, 2) at the first latent of each step, and of the next
    stop_z: torch.Tensor | None  # (B, d) the dropped latent at which the row stopped
    stopped: torch.Tensor      # (B,) bool: chose to stop (False: ran into the limit)


@dataclass
class Rollout:
    """Questions, each answered by `group` rows; row b answers question b // group. Log-probabilities are
    those under which the row was sampled, 0 where there is nothing to choose; a greedy one has none of its tokens."""

    prefix: torch.Tensor        # (Q, S)
    prefix_valid: torch.Tensor  # (Q, S)
    group: int
    z: torch.Tensor             # (B, N, c, d)
    steps: torch.Tensor         # (B,)
    stopped: torch.Tensor       # (B,) bool
    stop_z: torch.Tensor | None  # (B, d)
    tokens: torch.Tensor        # (B, A) answer tokens with <eos> where it came
    lengths: torch.Tensor       # (B,) of `tokens`
    latent_logp: torch.Tensor | None  # (B, N, c)
    stop_logp: torch.Tensor | None    # (B, N + 1): continue at steps 0 .. steps - 1, stop at `steps`
    token_logp: torch.Tensor | None  # (B, A)
    eps: torch.Tensor | None    # (B, K, c, d) what its latents were drawn with: z = mu + sigma eps
    sigma: float = 0.0          # mean over the latents used

    def rows(self, index):
        """The rollouts of rows `index` (whole groups or equal parts of each group, in order)."""
        questions, counts = torch.unique_consecutive(index // self.group, return_counts=True)
        group = int(counts[0])
        assert bool((counts == group).all())
        cut = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, v in cut.items():
            if torch.is_tensor(v):
                cut[name] = v[questions if name.startswith("prefix") else index]
        return Rollout(**{**cut, "group": group})

    def record(self, terms):
        """Take these log-probabilities (rl.Terms) for those under which the rows were sampled."""
        self.latent_logp, self.stop_logp, self.token_logp = (v if v is None else v.detach() for v in terms[:3])


def generate(model, h, cache, eos_id, max_tokens, uniform=None, temperature=1.0):
    """Continue every row of a batch from its last hidden state h (B, d) until <eos> or max_tokens.

    Greedy, or by inverse transform sampling with `uniform` (B, max_tokens). Returns tokens (B, A), lengths (B,) with
    <eos> counted, and the log-probabilities of what was sampled (B, A), 0 past the end; None where greedy."""
    B, device = len(h), h.device
    tokens = torch.zeros(B, max_tokens, dtype=torch.long, device=device)
    logps = None if uniform is None else torch.zeros(B, max_tokens, device=device, dtype=precise(h[:0]).dtype)
    lengths, rows = torch.zeros(B, dtype=torch.long, device=device), torch.arange(B, device=device)
    for i in range(max_tokens):
        logits = model.logits(h[rows])  # of the rows that still write
        if uniform is None:
            token = logits.argmax(dim=-1)
        else:
            logits = precise(logits) / temperature
            top = logits.amax(dim=-1, keepdim=True)
            cdf = (logits - top).exp_().cumsum(dim=-1)
            total = cdf[:, -1:]
            token = torch.searchsorted(cdf, uniform[rows, i:i + 1] * total, right=True).clamp_(max=cdf.shape[1] - 1)
            logps[rows, i] = (logits.gather(1, token) - top - total.log()).squeeze(1)
            token = token.squeeze(1)
        tokens[rows, i] = token
        lengths[rows] += 1
        rows = rows[token != eos_id]
        if i + 1 == max_tokens or not len(rows):
            break
        alive = torch.zeros(B, 1, dtype=torch.bool, device=device).index_fill_(0, rows, True)
        h = model.hidden(tokens[:, i:i + 1], cache=cache, valid=alive)[:, 0]
    return tokens[:, :i + 1], lengths, None if logps is None else logps[:, :i + 1]


LOGITS = 2**23  # that lie in memory at once


class LinearCrossEntropy(torch.autograd.Function):
    """sum_i w_i CE(weight h_i, target_i) of h (N, d), targets and w (N,), some rows at a time: logits over a whole
    vocabulary never lie in memory at once. The result is one number, so its gradients are known, up to a factor, as
    soon as it is. (torch.nn.functional.linear_cross_entropy does this too, but weighs no rows.)"""

    @staticmethod
    def forward(ctx, h, weight, targets, w):
        device = h.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
        need = h.requires_grad or weight.requires_grad
        grad_h = torch.empty_like(h) if need else None
        grad_weight = torch.zeros_like(weight) if weight.requires_grad else None
        total, cast = precise(h.new_zeros(())), weight.to(dtype)
        rows = max(1, LOGITS // len(weight))
        with torch.autocast(device, enabled=False):
            for start in range(0, len(h), rows):
                part = slice(start, start + rows)
                x, t, share = h[part].to(dtype), targets[part, None], w[part, None]
                logp = precise(x @ cast.t()).log_softmax(dim=-1)
                total -= (logp.gather(1, t) * share).sum()
                if need:
                    grad = logp.exp_().scatter_add_(1, t, -torch.ones_like(t, dtype=logp.dtype)).mul_(share).to(dtype)
                    grad_h[part] = grad @ cast
                    if grad_weight is not None:
                        grad_weight.addmm_(grad.t().to(weight.dtype), x.to(weight.dtype))
        ctx.save_for_backward(grad_h, grad_weight)
        return total

    @staticmethod
    def backward(ctx, g):
        grad_h, grad_weight = ctx.saved_tensors
        return grad_h * g, None if grad_weight is None else grad_weight.mul_(g), None, None


# --- the model ---

class LatentReasoner(nn.Module):
    """Policy, latent head, stop head and decoder. forward(Batch) gives the parts of the supervised loss."""

    def __init__(self, policy, config, decoder=None):
        """decoder: default, if config.decode asks for one, a copy of the policy. ValueError: the plan has no room."""
        super().__init__()
        latents, context = config.thoughts_per_step * config.max_steps, policy.config.max_position_embeddings
        if config.latent and latents >= context:
            raise ValueError(f"thoughts_per_step times max_steps is {latents}: no room in a context of {context} positions")
        self.config = config
        self.policy = policy
        d = policy.config.hidden_size
        self.decoder = copy.deepcopy(policy) if config.decode and decoder is None else decoder
        self.latent_head = LatentHead(d) if config.head else None
        self.stop_head = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, 2)) if config.stop else None

    def set_trainable(self, stage):
        """Only what gets a gradient requires one. stage: the curriculum's, or "rl" (the decoder is frozen)."""
        for p in self.parameters():
            p.requires_grad_(stage != 0)
        self.policy.requires_grad_(True)
        if self.decoder is not None and stage == "rl":
            self.decoder.requires_grad_(False)
        if self.latent_head is not None and not self.config.vae:
            self.latent_head.logvar.requires_grad_(False)  # nothing is sampled

    def reconfigured(self, config):
        """This model with the parts that another LatentConfig asks for, and the names of those that are new: what it
        has, it keeps (trained heads, say, where the decoder is left out)."""
        model, new = LatentReasoner(self.policy, config, self.decoder if config.decode else None), []
        for name in ("latent_head", "stop_head", "decoder"):
            if getattr(model, name) is not None:
                if getattr(self, name) is None:
                    new.append(name)
                else:
                    setattr(model, name, getattr(self, name))
        return model, new

    def copy_decoder(self):
        """The decoder starts as a copy of the (warmed up) policy."""
        if self.decoder is not None:
            self.decoder.load_state_dict(self.policy.state_dict())

    def latent(self, h):
        """mu, logvar (.., d) of the latent that follows hidden state h; logvar None where z is not sampled."""
        if self.latent_head is None:
            return h, None
        mu, logvar = self.latent_head(h)
        return mu, logvar if self.config.vae else None

    def draw(self, h, eps):
        """z, mu, logvar (B, d) of the latent after hidden state h; eps (B, d), or None for z = mu."""
        mu, logvar = self.latent(h)
        return mu if logvar is None or eps is None else mu + torch.exp(0.5 * logvar) * eps, mu, logvar

    def think(self, h, cache, steps=None, max_steps=None, eps=None, uniform=None):
        """The chain of latents, one position at a time, from h (B, d) at <|start-latent|>.

        steps (B,) with its maximum `max_steps` as a number: how many steps each row gets (training), else
        the stop head decides (a fixed number without one). eps (B, K, c, d): noise of the latents, None: z = mu.
        uniform (B, K): samples the stop decisions, None: stop where p(stop) > 1/2."""
        K, c, dtype = self.config.max_steps, self.config.thoughts_per_step, self.policy.embed_tokens.weight.dtype
        decide = steps is None and self.stop_head is not None
        if steps is None and not decide:
            steps, max_steps = torch.full((len(h),), K, device=h.device), K
        zs, mus, logvars, stop_logits, lives = [], [], [], [], []
        alive = torch.ones(len(h), dtype=torch.bool, device=h.device)
        stopped, stop_z = torch.zeros_like(alive), torch.zeros_like(precise(h))
        for k in range(K if self.stop_head is not None else max_steps):
            z, mu, logvar = self.draw(h, None if eps is None else eps[:, k, 0])
            if self.stop_head is not None:
                stop_logits.append(precise(self.stop_head(z.to(dtype))))
            if decide:
                p = stop_logits[-1].softmax(dim=-1)[:, 1]
                stop = alive & (p > (0.5 if uniform is None else uniform[:, k]))
                stopped, stop_z = stopped | stop, torch.where(stop[:, None], precise(z), stop_z)
                alive = alive & ~stop
                if not bool(alive.any()):
                    break
            else:
                alive = k < steps
                if k == max_steps:  # this latent was only there for the stop head to look at
                    break
            lives.append(alive)
            for j in range(c):
                if j > 0:
                    z, mu, logvar = self.draw(h, None if eps is None else eps[:, k, j])
                zs.append(z)
                mus.append(mu)
                logvars.append(logvar)
                h = self.policy.hidden(embeds=z.to(dtype)[:, None], cache=cache, valid=alive[:, None])[:, 0]
        N = len(lives)
        none = h.new_zeros(len(h), 0, c, h.shape[1])
        stack = lambda rows: torch.stack(rows, dim=1).unflatten(1, (N, c)) if N else none
        if len(stop_logits) == N and N:
            stop_logits.append(torch.zeros_like(stop_logits[0]))  # nothing was decided there
        return Thought(stack(zs), stack(mus), stack(logvars) if self.config.vae else None,
                       sum(live.long() for live in lives) if N else torch.zeros_like(alive, dtype=torch.long),
                       torch.stack(stop_logits, dim=1) if stop_logits else None,
                       stop_z if self.stop_head is not None else None, stopped)

    def forward(self, batch):
        """Loss parts of a Batch (paper, section 3.2): answer, decode, stop, kl. Each is this micro-batch's share
        of the global batch's mean. Gradients flow through the whole chain of latents."""
        losses = {}
        if batch.max_steps == 0:
            h = self.policy.hidden(batch.prefix, valid=batch.prefix_valid)
        else:
            cache = KVCache()
            # one look-up, since the gradient of each is as large as the table
            embeds = self.policy.embed_tokens(torch.cat((batch.prefix, batch.text), dim=1))
            prefix, text = embeds.split((batch.prefix.shape[1], batch.text.shape[1]), dim=1)
            h = self.policy.hidden(embeds=prefix, cache=cache, valid=batch.prefix_valid)
            thought = self.think(last(h, batch.prefix_valid), cache, batch.steps, batch.max_steps, batch.noise)
            h = self.policy.hidden(embeds=text, cache=cache, valid=batch.text_valid)
            if self.stop_head is not None:
                ce = F.cross_entropy(thought.stop_logits.flatten(0, 1), batch.stop_targets.flatten(), reduction="none")
                losses["stop"] = (ce * batch.stop_weight.flatten()).sum()
            if thought.logvar is not None:
                losses["kl"] = (gaussian_kl(thought.mu, thought.logvar).mean(dim=2) * batch.step_weight).sum()
            if self.decoder is not None:
                losses["decode"] = self.decode_loss(thought.z, batch)
        at = batch.targets >= 0  # the vocabulary only where a token is asked for
        weight = torch.full((int(at.sum()),), batch.token_weight, device=h.device)
        losses["answer"] = LinearCrossEntropy.apply(h[at], self.policy.output_weight, batch.targets[at], weight)
        return losses

    def decode_loss(self, z, batch):
        """Cross-entropy of each step's text given its latents, all steps of the batch in one pass."""
        embed = self.decoder.embed_tokens
        inputs = torch.cat((z[batch.decode_index].to(embed.weight.dtype), embed(batch.decode[:, :-1])), dim=1)
        at = batch.decode_weight > 0
        valid = F.pad(at[:, :-1], (z.shape[2], 0), value=True)  # the latents, and all words but the last
        h = self.decoder.hidden(embeds=inputs, valid=valid)[:, z.shape[2] - 1:]
        return LinearCrossEntropy.apply(h[at], self.decoder.output_weight, batch.decode[at], batch.decode_weight[at])

    @torch.no_grad()
    def rollout(self, questions, group=1, noise=None, max_tokens=16, temperature=1.0, latent_temperature=1.0):
        """Answer each question (lists of ids as in data.Encoded) `group` times, batched and KV-cached; the question
        is read once for its whole group. noise: a Noise for Q x group rows; None: greedy (z = mu, stop where
        p(stop) > 1/2, argmax; paper, section 4). temperature: of sampled answer tokens, 0: argmax. latent_temperature:
        times sigma. Text methods write their chain of thought: raise max_tokens."""
        device = self.policy.embed_tokens.weight.device
        start = [self.config.start_id] if self.config.latent else []
        prefix, valid = (t.to(device) for t in pad([q + start for q in questions]))
        noise = noise and noise.to(device)
        eps = noise and noise.latent * latent_temperature
        cache = KVCache()
        h = last(self.policy.hidden(prefix, cache=cache, valid=valid), valid).repeat_interleave(group, dim=0)
        cache.expand(group)
        B, c = len(h), self.config.thoughts_per_step
        if self.config.latent:
            t = self.think(h, cache, eps=eps, uniform=noise and noise.stop)
            end = torch.full((B, 1), self.config.end_id, device=device)
            h = self.policy.hidden(end, cache=cache)[:, 0]
        else:
            none = torch.zeros(B, dtype=torch.long, device=device)
            t = Thought(h.new_zeros(B, 0, c, h.shape[1]), None, None, none, None, None, none.bool())
        tokens, lengths, token_logp = generate(self.policy, h, cache, self.config.eos_id, max_tokens,
                                               noise.answer if noise and temperature else None, temperature)
        used = first(t.steps, t.z.shape[1])
        latent_logp = stop_logp = None
        sigma = 0.0
        if t.logvar is not None:
            latent_logp = gaussian_logp(t.z, t.mu, widened(t.logvar, latent_temperature)) * used[..., None]
            sigma = float((t.logvar * 0.5).exp()[used].mean()) if bool(used.any()) else 0.0
        if t.stop_logits is not None:
            stop_logp = stop_terms(t.stop_logits, t.steps, t.stopped)
        return Rollout(prefix, valid, group, precise(t.z), t.steps, t.stopped, t.stop_z, tokens, lengths, latent_logp,
                       stop_logp, token_logp, eps, sigma)

    @torch.no_grad()
    def decode_steps(self, z, steps, max_tokens=16, rows=512):
        """Token ids, per row and step, of what the latents z (B, N, c, d) say in words (greedy); all used
        steps of the batch go through the decoder together (`rows` at a time, which bounds memory)."""
        used = first(steps, z.shape[1])
        flat, out = z[used].to(self.decoder.embed_tokens.weight.dtype), []
        for part in flat.split(rows) if len(flat) else ():
            cache = KVCache()
            h = self.decoder.hidden(embeds=part, cache=cache)[:, -1]
            tokens, lengths, _ = generate(self.decoder, h, cache, self.config.eos_id, max_tokens)
            out += [t[:n] for t, n in zip(tokens.tolist(), lengths.tolist())]
        flat = iter([t[:-1] if t and t[-1] == self.config.eos_id else t for t in out])
        return [[next(flat) for _ in range(n)] for n in steps.tolist()]

    # --- checkpoints: a Hugging Face LLaMA, with the decoder and the heads beside it ---

    def save_pretrained(self, path):
        path = Path(path)
        self.policy.save_pretrained(path)
        if self.decoder is not None:
            self.decoder.save_pretrained(path / "decoder")
        heads = {n: p for n, p in self.state_dict().items() if not n.startswith(("policy.", "decoder."))}
        if heads:
            save_tensors(heads, path / "heads.safetensors")
        write_json(path / "latent.json", asdict(self.config))

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu", decode=True):
        """A directory written by save_pretrained; decode=False leaves its decoder out. ValueError, FileNotFoundError: see
        LLaMA.from_pretrained."""
        path = Path(path)
        file = path / "latent.json"
        raw = read_json(file)
        if not isinstance(raw, dict):
            raise ValueError(f"{file}: not the configuration of a latent reasoner")
        wrong = sorted(set(raw) ^ {f.name for f in fields(LatentConfig)})
        if wrong:
            raise ValueError(f"{file}: key {short(wrong[0])} is {'unknown' if wrong[0] in raw else 'missing'}")
        try:
            config = LatentConfig(**raw)
            config.decode &= decode
        except ValueError as e:
            raise ValueError(f"{file}: {e}") from None
        policy = LLaMA.from_pretrained(path, dtype, device)
        if not all(0 <= i < policy.config.vocab_size for i in (config.start_id, config.end_id, config.eos_id)):
            raise ValueError(f"{file}: a token id is outside the vocabulary")
        decoder = LLaMA.from_pretrained(path / "decoder", dtype, device) if config.decode else None
        try:
            model = cls(policy, config, decoder).to(device, dtype)
        except ValueError as e:
            raise ValueError(f"{file}: {e}") from None
        file = path / "heads.safetensors"
        own = {n: p for n, p in model.state_dict().items() if not n.startswith(("policy.", "decoder."))}
        if own:
            found = {n: (shape, kind in FLOATS) for n, (shape, kind, _) in tensor_headers(file).items()}
            if found != {n: (tuple(p.shape), True) for n, p in own.items()}:
                raise ValueError(f"{file}: its tensors are not the heads that {path / 'latent.json'} asks for")
            model.load_state_dict(load_file(file), strict=False)
        return model


def last(h, valid):
    """Hidden state (B, d) at the last valid position of each right-padded row."""
    return h[torch.arange(len(h), device=h.device), valid.sum(dim=1) - 1]


def stop_places(steps, stopped, width):
    """Bool mask (B, width) of the step at which a row chose to stop: `steps`, or none."""
    return (torch.arange(width, device=steps.device) == steps[:, None]) & stopped[:, None]


def stop_terms(stop_logits, steps, stopped):
    """log p of each stop decision taken (B, N): continue at steps 0 .. steps - 1, stop at `steps` where chosen."""
    N, logp = stop_logits.shape[1], F.log_softmax(stop_logits, dim=-1)
    return logp[..., 0] * first(steps, N) + logp[..., 1] * stop_places(steps, stopped, N)
