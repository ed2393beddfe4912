"""The latent reasoner: a LLaMA that thinks in sampled latent tokens, seen as a conditional VAE.

    question  <|start-latent|>  z z | z z | z z  <|end-latent|>  ### answer  <eos>
                                step1 step2 step3

The policy is the encoder: each latent is drawn from N(mu, sigma^2) of the hidden state before it and is the
next input embedding. The decoder, a second LLaMA, puts the latents of a step into words. The stop head looks
at the first latent of a step.
"""

import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from model import (LLaMA, Padded, check_tensors, length_mask, one_line, product_dtype, read_json,
                   save_tensors, tensor_headers, write_json)

START, END = "<|start-latent|>", "<|end-latent|>"
SFT_NOISE, RL_NOISE, RL_ORDER, INIT_WEIGHTS = range(4)  # streams of random numbers of a seed
MAX_LOGITS = {"cpu": 2**25, "cuda": 2**28}  # logits that lie in memory at once
MAX_DECODED = {"cpu": 2**9, "cuda": 2**11}  # reasoning steps that are put into words at once


@dataclass
class LatentConfig:
    """What a reasoner is made of (its bool fields are its parts), and the ids it needs."""

    method: str
    latent: bool  # think in latents, else in text (cot) or not at all (nocot)
    head: bool    # a latent head makes z from h, else h itself is fed back
    vae: bool     # z is sampled and there is a KL term, else z = mu
    stop: bool    # a stop head ends the plan, else all have max_steps reasoning steps
    decode: bool  # a decoder must write each reasoning step from its latents
    thoughts_per_step: int  # c
    max_steps: int          # K
    start_id: int    # <|start-latent|>
    end_id: int      # <|end-latent|>
    eos_id: int
    vocab_size: int  # of the tokenizer: further rows of the weights are never sampled

    def __post_init__(self):
        for name, kind in self.__annotations__.items():
            if type(getattr(self, name)) is not kind:
                raise ValueError(f"{name} must be of type {kind.__name__}")
        known = all(0 <= i < self.vocab_size for i in (self.start_id, self.end_id, self.eos_id))
        if not known or self.method not in METHODS or min(self.thoughts_per_step, self.max_steps) < 1:
            raise ValueError("method, thoughts_per_step, max_steps or an id is out of range")
        if (self.vae and not self.head) or ((self.head or self.stop or self.decode) and not self.latent):
            raise ValueError(f"--vae, --stop or --decode yes does not go with --method {self.method}")

    def stage_steps(self, stage):
        """Most latent reasoning steps of a plan at a curriculum's stage, 0 to K + 1 (paper, section 3)."""
        return min(stage, self.max_steps) if self.latent else 0

    def latent_steps(self, example, stage):
        """How many reasoning steps of an example are latent; without a stop head as many in all."""
        n = self.stage_steps(stage)
        return min(n, len(example.steps)) if self.stop else n


PARTS = tuple(name for name, kind in LatentConfig.__annotations__.items() if kind is bool)
METHODS = {method: {part: part in own for part in PARTS} for method, own in {
    "atp": PARTS, "simcot": ("latent", "decode"), "coconut": ("latent",),
    "cot": (), "nocot": ()}.items()}  # paper, section 4: the baselines are parts switched off


class LatentHead(nn.Module):
    """h (.., d) -> mu, logvar (.., d)."""

    def __init__(self, d):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, d), nn.LayerNorm(d))
        self.mu, self.logvar = nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, h):
        h = self.trunk(h)
        return precise(self.mu(h)), precise(self.logvar(h)).clamp(-12, 6)


def precise(x):
    """In at least fp32: what is exponentiated or summed must not stay bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gaussian_logp(z, mu, logvar):
    """log N(z; mu, exp(logvar)), summed over the last dimension."""
    return -0.5 * ((z - mu) ** 2 * torch.exp(-logvar) + logvar + math.log(2 * math.pi)).sum(dim=-1)


def gaussian_kl(mu, logvar):
    """KL(N(mu, exp(logvar)) || N(0, 1)), mean over the last dimension."""
    return 0.5 * (mu**2 + logvar.exp() - logvar - 1).mean(dim=-1)


def generator(*ids):
    """Random numbers, on the CPU, that depend on these numbers alone."""
    seed = np.random.SeedSequence(ids).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> 1))  # 63 bits


def device_of(name):
    """The device that --device names: auto, cpu or cuda."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch sees no GPU")
    gpu = name != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")


def to_device(record, device):
    """A NamedTuple with its tensors on `device`. A copy from pinned memory does not make the CPU wait."""
    if isinstance(record, tuple):
        return record._make(to_device(v, device) for v in record)
    moves = device.type != "cpu" and torch.is_tensor(record)
    return record.pin_memory().to(device, non_blocking=True) if moves else record


# --- batches of the supervised stage ---

class Batch(NamedTuple):
    """A micro-batch, whose losses are shares of the global batch's mean. Indices are made on the CPU, which
    would wait for a GPU that is asked for them."""

    prefix: Padded | None       # (B, S) question and <|start-latent|>; None without latents
    text: Padded                # (B, T) <|end-latent|> or, without latents, the question; then the text
    target_index: torch.Tensor  # (A,) ascending, in the flattened (B * T): inputs that have a target
    targets: torch.Tensor       # (A,) ids to predict there
    target_weight: float        # 1 / targets of the global batch
    steps: torch.Tensor         # (B,) latent reasoning steps
    N: int                      # their maximum
    stops: torch.Tensor         # (B,) bool: the stop head must say stop after the last one
    decode: Padded              # (P, U) text of all latent reasoning steps, each with <eos>
    decode_index: torch.Tensor  # (P,) which of the flattened (B * N) they are
    step_weight: float          # 1 / examples of the global batch / steps that the stage allows, as released
    noise: torch.Tensor | None  # (B, n, c, d) of the latents, n >= min(N + 1, K)


def remaining_text(example, config, stage):
    """Ids after the latents: the reasoning steps that are still text, then the answer with its <eos>. At the
    last stage, K + 1, the last latent step stands for all the rest."""
    done = config.method == "nocot" or (config.latent and stage > config.max_steps)
    steps = [] if done else example.steps[config.latent_steps(example, stage):]
    return sum(steps, []) + example.answer


def decoded_text(example, config, k, stage):
    """Ids that latent step k must decode to: at stage K + 1 the last one to all the rest. A step beyond the
    example's (SIM-CoT always makes K) decodes to the answer, as in SIM-CoT's code."""
    last = stage > config.max_steps and k == config.max_steps - 1
    steps = example.steps[k:] if last else example.steps[k:k + 1]
    return sum(steps, []) + [config.eos_id] if steps else example.answer


def collate(examples, config, stage, noise=None, total_examples=None, total_tokens=None):
    """A Batch of data.Encoded at a stage (0: all text). total_*: of the global batch, by default this one."""
    steps = [config.latent_steps(e, stage) for e in examples]
    N = max(steps)
    written = [remaining_text(e, config, stage) for e in examples]
    stage_steps, targets = config.stage_steps(stage), sum(written, [])
    # inputs are targets shifted by one: the last one is no input
    rows = [([config.end_id] if stage_steps else e.question) + ids[:-1] for e, ids in zip(examples, written)]
    text = Padded.of(rows)
    prefix = Padded.of([e.question + [config.start_id] for e in examples]) if stage_steps else None
    # each of a row's last inputs predicts the next id of what is written
    target_index = [b * text.ids.shape[1] + i for b, (row, ids) in enumerate(zip(rows, written))
                    for i in range(len(row) - len(ids), len(row))]
    # stop is a target after the last step, if the stage has room for another
    stops = [n == len(e.steps) and n < stage_steps for n, e in zip(steps, examples)]
    decodes = [(b, k) for b, n in enumerate(steps) for k in range(n) if config.decode]
    words = Padded.of([decoded_text(examples[b], config, k, stage) for b, k in decodes])
    decode_index = torch.tensor([b * N + k for b, k in decodes], dtype=torch.long)
    step_weight = 1 / (total_examples or len(examples)) / max(1, stage_steps)
    return Batch(prefix, text, torch.tensor(target_index), torch.tensor(targets),
                 1 / (total_tokens or len(targets)), torch.tensor(steps), N, torch.tensor(stops), words,
                 decode_index, step_weight, noise)


# --- rollouts ---

class Noise(NamedTuple):
    """All randomness of rollouts, drawn for the global batch and cut by rows: no split changes a sample."""

    latent: torch.Tensor  # (B, K, c, d) standard normal
    stop: torch.Tensor    # (B, K) uniform
    answer: torch.Tensor  # (B, A) uniform

    @classmethod
    def draw(cls, rows, config, d, max_tokens, generator):
        K, c = (config.max_steps, config.thoughts_per_step) if config.latent else (0, 0)
        return cls(torch.randn(rows, K, c, d, generator=generator), torch.rand(rows, K, generator=generator),
                   torch.rand(rows, max_tokens, generator=generator))


class Plan(NamedTuple):
    """Latent plans of up to N reasoning steps, of which the first `steps` count."""

    z: torch.Tensor              # (B, N, c, d) as fed to the policy
    mu: torch.Tensor             # (B, N, c, d)
    logvar: torch.Tensor | None  # (B, N, c, d), None where z is not sampled
    steps: torch.Tensor          # (B,)
    stopped: torch.Tensor        # (B,) bool: a rollout's row chose to stop, before the limit
    stop_z: torch.Tensor         # (B, N + 1, d) first latents of all steps and of the next, if drawn, else 0


class Rollout(NamedTuple):
    """Questions, each answered by `group` rows: row b answers question b // group."""

    prefix: Padded            # (Q, S)
    group: int
    plan: Plan                # of B rows
    eps: torch.Tensor | None  # (B, K, c, d): z = mu + sigma eps
    tokens: torch.Tensor      # (B, A) answer tokens, with <eos> where it came
    lengths: torch.Tensor     # (B,) of `tokens`

    def select(self, questions, members):
        """The rollouts of some members of the groups of some questions (sequences of numbers)."""
        questions, members = (torch.tensor(x, device=self.tokens.device) for x in (questions, members))
        rows = (questions[:, None] * self.group + members).flatten()
        cut = lambda values: [None if v is None else v[rows] for v in values]
        prefix = Padded.masked(self.prefix.ids[questions], self.prefix.mask[questions])
        rest = cut((self.eps, self.tokens, self.lengths))
        return Rollout(prefix, len(members), Plan(*cut(self.plan)), *rest)


def text_loss(model, h, targets):
    """Sum of CE(logits of h_i, target_i) over h (M, d), targets (M,). If all logits would be too many for
    memory, those of some rows at a time are made, and again in backward."""
    vocab, table = model.config.vocab_size, model.output_weight()
    bias = torch.zeros_like(table[:, 0])
    bias[vocab:] = -math.inf  # rows that only pad the table are no tokens: probability 0

    def loss_of(h, targets):
        return F.cross_entropy(precise(F.linear(h, table, bias)), targets, reduction="sum")

    rows = max(1, MAX_LOGITS[h.device.type] // vocab)
    if len(h) <= rows:
        return loss_of(h, targets)
    parts = zip(h.split(rows), targets.split(rows))
    return sum(checkpoint(loss_of, *part, use_reentrant=False) for part in parts)


# --- the model ---

class LatentReasoner(nn.Module):
    """Policy, latent head, stop head and decoder (by default a copy of the policy)."""

    def __init__(self, policy, config, decoder=None):
        super().__init__()
        self.policy, d = policy, policy.config.hidden_size
        self.configure(config)
        self.decoder = copy.deepcopy(policy) if config.decode and decoder is None else decoder
        self.latent_head = LatentHead(d) if config.head else None
        self.stop_head = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, 2)) if config.stop else None

    def configure(self, config):
        """Work by this LatentConfig, if its plans fit the context."""
        context = self.policy.config.max_position_embeddings
        if config.latent and config.thoughts_per_step * config.max_steps >= context:
            raise ValueError(f"--thoughts_per_step times --max_steps: no room in a context of {context}")
        self.config = config

    @property
    def device(self):
        return self.policy.embed_tokens.weight.device

    @property
    def ends(self):
        """Ids that end a text: <eos> and those of config.json's eos_token_id."""
        ids = self.policy.config.eos_token_id
        return sorted({self.config.eos_id, *(ids if isinstance(ids, list) else [ids])} - {None})

    def llamas(self):
        return [llama for llama in (self.policy, self.decoder) if llama is not None]

    def set_trainable(self, latents=True, decoder=True):
        """Only what gets a gradient requires one. latents: not in the text stage. decoder: not in RL."""
        self.requires_grad_(latents)
        self.policy.requires_grad_(True)
        if self.decoder is not None:
            self.decoder.requires_grad_(latents and decoder)
        if self.latent_head is not None and not self.config.vae:
            self.latent_head.logvar.requires_grad_(False)  # nothing is sampled

    def latent(self, h):
        """mu, logvar (.., d) of the latent after hidden state h; logvar None where z is not sampled."""
        if self.latent_head is None:
            return h, None
        mu, logvar = self.latent_head(h)
        return mu, logvar if self.config.vae else None

    def read_questions(self, prefix, tail, group=1, embeds=None):
        """The last hidden state (B, d) of each question of a Padded, repeated for its group, and the cache.
        embeds: of prefix.ids, where they are known."""
        last = prefix.mask.sum(dim=1).cumsum(dim=0) - 1  # indices into prefix.index
        embeds = self.policy.embed_tokens(prefix.ids) if embeds is None else embeds
        h, cache = self.policy.read(embeds, prefix, last, tail, group)
        return h.repeat_interleave(group, dim=0), cache

    def think(self, h, cache, limit, steps=None, eps=None, uniform=None):
        """A Plan: latents, one position at a time, from h (B, d) at <|start-latent|>.

        steps (B,): the reasoning steps that each row makes, at most `limit` (training). None: the stop head
        decides; without one all make `limit`. eps (B, K, c, d): noise of the latents, None: z = mu.
        uniform (B, K): samples the stops, None: stop where p(stop) > 1/2."""
        config, c, latents, stop_z = self.config, self.config.thoughts_per_step, [], []
        alive = torch.ones_like(h[:, 0], dtype=torch.bool)
        taken, all_stopped = torch.zeros_like(alive, dtype=torch.long), False

        def draw(h, k, j):
            """Latent j of reasoning step k: z, mu, logvar (B, d)."""
            mu, logvar = self.latent(h)
            sampled = logvar is not None and eps is not None
            return (mu + torch.exp(0.5 * logvar) * eps[:, k, j] if sampled else mu), mu, logvar

        for k in range(limit):
            latent = draw(h, k, 0)
            stop_z.append(latent[0])
            if steps is not None:
                alive = k < steps
            elif config.stop:
                p_stop = self.stop_logits(latent[0]).softmax(dim=-1)[:, 1]
                alive = alive & ~(p_stop > (0.5 if uniform is None else uniform[:, k]))
                if not alive.any():
                    all_stopped = True
                    break
            taken = taken + alive
            for j in range(c):
                latent = draw(h, k, j) if j else latent
                latents.append(latent)
                h = self.policy.step(latent[0][:, None], cache, alive[:, None])[:, 0]
        if not all_stopped:  # else the last latent that the stop head saw is there already
            # given plans may stop at the first latent after the longest one: it is drawn, but not fed back
            beyond = steps is not None and config.stop and limit < config.max_steps
            stop_z.append(draw(h, limit, 0)[0] if beyond else torch.zeros_like(h))

        def stack(i):
            """(B, N, c, d); N may be 0."""
            none = h.new_zeros(len(h), 0, h.shape[1])
            return torch.cat([none, *(x[i][:, None] for x in latents)], dim=1).unflatten(1, (-1, c))

        return Plan(stack(0), stack(1), stack(2) if config.vae else None, taken, ~alive,
                    torch.stack(stop_z, dim=1))

    def stop_logits(self, stop_z):
        return precise(self.stop_head(stop_z.to(self.policy.embed_tokens.weight.dtype)))

    def forward(self, batch):
        """{answer, stop, kl, decode: loss} of a Batch (paper, section 3.2)."""
        losses, policy, N = {}, self.policy, batch.N
        if batch.prefix is None:
            wanted = torch.searchsorted(batch.text.index, batch.target_index)  # indices into text.index
            h, _ = policy.read(policy.embed_tokens(batch.text.ids), batch.text, wanted)
        else:
            widths = batch.prefix.ids.shape[1], batch.text.ids.shape[1]
            # one look-up, since the gradient of each is as large as the table
            embeds = policy.embed_tokens(torch.cat((batch.prefix.ids, batch.text.ids), dim=1))
            prefix, text = embeds.split(widths, dim=1)
            tail = N * self.config.thoughts_per_step + widths[1]
            h, cache = self.read_questions(batch.prefix, tail, embeds=prefix)
            plan = self.think(h, cache, N, batch.steps, batch.noise)
            h = policy.step(text, cache, batch.text.mask).flatten(0, 1).index_select(0, batch.target_index)
            if self.config.stop:
                stop = ~length_mask(batch.steps, N + 1)
                logits = self.stop_logits(plan.stop_z).transpose(1, 2)  # (B, 2, N + 1)
                ce = F.cross_entropy(logits, stop.long(), reduction="none")
                asked = length_mask(batch.steps + batch.stops, N + 1)
                losses["stop"] = (ce * asked).sum() * batch.step_weight
            if plan.logvar is not None:
                kl = gaussian_kl(plan.mu, plan.logvar).mean(dim=2)  # (B, N)
                losses["kl"] = (kl * length_mask(batch.steps, N)).sum() * batch.step_weight
            if self.decoder is not None:
                losses["decode"] = self.decode_loss(plan.z, batch)
        losses["answer"] = text_loss(policy, h, batch.targets) * batch.target_weight
        return losses

    def decode_loss(self, z, batch):
        """The decoder's loss of all reasoning steps' texts, given their latents."""
        latents = z.flatten(0, 1).index_select(0, batch.decode_index)  # (P, c, d)
        inputs = torch.cat((latents, self.decoder.embed_tokens(batch.decode.ids[:, :-1])), dim=1)
        h = self.decoder.read(inputs)[0][:, z.shape[2] - 1:].flatten(0, 1)  # from the last latent on
        h, targets = (t.index_select(0, batch.decode.index) for t in (h, batch.decode.ids.flatten()))
        return text_loss(self.decoder, h, targets) * batch.step_weight

    @torch.no_grad()
    def rollout(self, questions, group=1, noise=None, max_tokens=16, temperature=1.0):
        """Answer each question (list of ids) `group` times. noise: a Noise of Q x group rows, None: greedy
        (paper, section 4). temperature: of answer tokens, 0: stops and tokens are greedy, latents sampled."""
        config = self.config
        steps, start = (config.max_steps, [config.start_id]) if config.latent else (0, [])
        prefix = Padded.of([question + start for question in questions])
        prefix, noise = (to_device(x, self.device) for x in (prefix, noise))
        eps, u_stop, u_answer = noise or (None, None, None)
        if not temperature:
            u_stop = u_answer = None
        tail = steps * config.thoughts_per_step + 1 + max_tokens  # latents, <|end-latent|>, answer
        h, cache = self.read_questions(prefix, tail, group)
        plan = self.think(h, cache, steps, eps=eps, uniform=u_stop)
        if config.latent:
            end = torch.full_like(plan.steps[:, None], config.end_id)
            h = self.policy.step(self.policy.embed_tokens(end), cache)[:, 0]
        text = self.generate(self.policy, h, cache, max_tokens, u_answer, temperature)
        return Rollout(prefix, group, plan, eps, *text)

    def generate(self, llama, h, cache, max_tokens, uniform=None, temperature=1.0):
        """Continue each row from its last hidden state h (B, d) by the likeliest token, or by inverse
        transform of uniform (B, max_tokens). Returns tokens (B, A) and lengths (B,), the end counted."""
        weight, vocab = llama.output_weight().to(product_dtype(h)), self.config.vocab_size
        ends, alive = torch.tensor(self.ends, device=h.device), torch.ones_like(h[:, 0], dtype=torch.bool)
        tokens, lengths = [], torch.zeros_like(alive, dtype=torch.long)
        for i in range(max_tokens):
            logits = F.linear(h, weight)[:, :vocab]
            if uniform is None:
                token = logits.argmax(dim=-1)
            else:
                cdf = (precise(logits) / temperature).softmax(dim=-1).cumsum(dim=-1)
                token = torch.searchsorted(cdf, uniform[:, i:i + 1] * cdf[:, -1:], right=True)
                token = token.clamp(max=vocab - 1)[:, 0]
            tokens.append(token * alive)
            lengths = lengths + alive
            alive = alive & (token[:, None] != ends).all(dim=1)
            if i + 1 == max_tokens or not alive.any():
                break
            h = llama.step(llama.embed_tokens(token[:, None]), cache, alive[:, None])[:, 0]
        return torch.stack(tokens, dim=1), lengths

    # --- in words ---

    @torch.no_grad()
    def plan_texts(self, z, steps, tokenizer):
        """What each of the first `steps` (B,) of z (B, N, c, d) says in words: a list for each row."""
        # a step of the built-in task has 8 tokens; step K may stand for several
        max_tokens = max(1, min(64, self.decoder.config.max_position_embeddings // 16))
        steps, words, size = steps.tolist(), [], MAX_DECODED[z.device.type]
        used = [b * z.shape[1] + k for b, n in enumerate(steps) for k in range(n)]
        z = z.flatten(0, 1)
        for i in range(0, len(used), size):
            h, cache = self.decoder.read(z[used[i:i + size]], tail=max_tokens)
            texts, _ = self.texts(*self.generate(self.decoder, h[:, -1], cache, max_tokens), tokenizer)
            words += [text.strip() for text in texts]
        words = iter(words)
        return [[next(words) for _ in range(n)] for n in steps]

    def texts(self, tokens, lengths, tokenizer):
        """The text of each row of tokens (B, A), and whether an end closed it."""
        rows = [row[:n] for row, n in zip(tokens.tolist(), lengths.tolist())]
        ended = [row[-1] in self.ends for row in rows]
        return [tokenizer.decode(row[:-1] if end else row) for row, end in zip(rows, ended)], ended

    # --- checkpoints: a Hugging Face LLaMA, with the decoder and the heads beside it ---

    def heads(self):
        return {n: p for n, p in self.state_dict().items() if not n.startswith(("policy.", "decoder."))}

    def fits(self, config):
        """Whether a model of this LatentConfig has the same heads, and a decoder or not as this one."""
        with torch.device("meta"):
            other = LatentReasoner(LLaMA(self.policy.config), config)
        shapes = lambda model: {name: p.shape for name, p in model.heads().items()}
        return shapes(self) == shapes(other) and len(self.llamas()) == len(other.llamas())

    def save_pretrained(self, path):
        path = Path(path)
        for llama, folder in zip(self.llamas(), (path, path / "decoder")):
            llama.save_pretrained(folder)
        if self.heads():
            save_tensors(self.heads(), path / "heads.safetensors")
        write_json(path / "latent.json", asdict(self.config))

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu", decode=True):
        """What save_pretrained wrote; decode=False leaves the decoder out."""
        path, decoder = Path(path), None
        raw, policy = read_json(path / "latent.json"), LLaMA.from_pretrained(path, dtype, device)
        try:
            config = LatentConfig(**raw)
            config.decode &= decode
            if config.decode:
                decoder = LLaMA.from_pretrained(path / "decoder", dtype, device)
            model = cls(policy, config, decoder).to(device, dtype)
            tables = {(m.config.vocab_size, m.config.hidden_size) for m in model.llamas()}
            if len(tables) > 1 or config.vocab_size > policy.config.vocab_size:
                raise ValueError(f"vocab_size {config.vocab_size} does not go with embeddings {tables}")
        except (ValueError, TypeError) as e:
            raise ValueError(f"{path / 'latent.json'}: {one_line(e)}") from None
        if model.heads():
            file = path / "heads.safetensors"
            check_tensors(tensor_headers(file), model.heads(), file)
            model.load_state_dict(load_file(file), strict=False)
        return model
