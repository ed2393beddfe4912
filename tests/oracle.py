"""The method by plain loops: an oracle for losses, rollouts and the RL objective, and tiny models for it.

Everything here is written from the paper's description and from the behaviour of its released code, not from
vae.py or rl.py. It reads one row at a time, a whole pass for each position, without cache, padding or masks.
It shares only weights with the code under test, and by default the LLaMA's pass: each function takes another
as `read`."""

import math

import torch
import torch.nn.functional as F

from data import Encoded, Example
from model import LLaMA, LLaMAConfig
from vae import METHODS, LatentConfig, LatentReasoner

START, END, EOS = 40, 41, 42


def tiny(method="atp", c=2, K=3, d=16, seed=0, scale=0.3, dtype=torch.float32,
         rows=43, ends=None, **parts):
    """A small reasoner with weights large enough that attention, rotary positions and noise all matter.

    rows: of the embedding; the tokenizer knows the first 43 ids. ends: config.json's eos_token_id."""
    torch.manual_seed(seed)
    policy = LLaMA(LLaMAConfig(vocab_size=rows, hidden_size=d, intermediate_size=24, num_hidden_layers=2,
                               num_attention_heads=4, num_key_value_heads=2, head_dim=6, eos_token_id=ends))
    config = LatentConfig(**{**METHODS[method], **parts}, method=method, thoughts_per_step=c, max_steps=K,
                          start_id=START, end_id=END, eos_id=EOS, vocab_size=43)
    model = LatentReasoner(policy, config)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p[:rows] if "embed_tokens" in name else p, std=scale)
    if model.latent_head is not None:
        torch.nn.init.constant_(model.latent_head.logvar.bias, -1.0)
    return model.to(dtype)


def examples(n, seed=0, steps=(1, 5)):
    """Random token sequences of unlike lengths."""
    g = torch.Generator().manual_seed(seed)
    ints = lambda low, high, k: torch.randint(low, high, (k,), generator=g).tolist()
    rows = []
    for i in range(n):
        question = ints(0, 40, ints(2, 9, 1)[0])
        text = [ints(0, 40, ints(1, 5, 1)[0]) for _ in range(ints(*steps, 1)[0])]
        rows.append(Encoded(question, text, ints(0, 40, 2) + [EOS], Example("q", (), "1", f"row:{i}")))
    return rows


# --- parts ---

def read(llama, embeds):
    """Last hidden state (d,) after a list of embeddings (d,), by one uncached pass."""
    h, _ = llama.read(torch.stack([e.to(llama.embed_tokens.weight.dtype) for e in embeds])[None])
    return h[0, -1]


def embed(llama, ids):
    return [llama.embed_tokens.weight[i] for i in ids]


def log_probs(llama, h):
    """Log-probabilities (vocab,) of the next token."""
    table = llama.embed_tokens if llama.lm_head is None else llama.lm_head
    return F.linear(h, table.weight[:llama.config.vocab_size]).log_softmax(0)


def latent_head(model, h):
    """mu, logvar (d,): linear, GELU, linear, LayerNorm, then a linear layer each. The bounds of logvar, which
    the released code does not have, are far from what tiny models give."""
    head = model.latent_head
    inner, _, outer, norm = head.trunk
    x = F.linear(h, inner.weight, inner.bias)
    x = F.linear(x * (1 + torch.erf(x / math.sqrt(2))) / 2, outer.weight, outer.bias)
    x = (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-5) * norm.weight + norm.bias
    return F.linear(x, head.mu.weight, head.mu.bias), F.linear(x, head.logvar.weight, head.logvar.bias)


def stop_head(model, z):
    """log p(continue), log p(stop) given the first latent of a step."""
    inner, _, outer = model.stop_head
    x = F.linear(z.to(inner.weight.dtype), inner.weight, inner.bias)
    x = F.linear(x * (1 + torch.erf(x / math.sqrt(2))) / 2, outer.weight, outer.bias)
    return x.log_softmax(0)


def next_latent(model, embeds, eps, read):
    """z, mu, logvar after a list of embeddings. Without a latent head z is the hidden state, and the others are
    None. Without the VAE, or without noise, z = mu."""
    h = read(model.policy, embeds)
    if not model.config.head:
        return h, None, None
    mu, logvar = latent_head(model, h)
    if not model.config.vae or eps is None:
        return mu, mu, logvar
    return mu + (logvar / 2).exp() * eps, mu, logvar


# --- rollouts ---

def pick(logits, u):
    """Inverse transform sampling of one row, or argmax."""
    if u is None:
        return int(logits.argmax())
    total = 0.0
    p = logits.softmax(0)
    for i, x in enumerate(p.tolist()):
        total += x
        if total > u * float(p.sum()):
            return i
    return len(p) - 1


def ends(model):
    """The ids that end a text: the tokenizer's, and all of a list in config.json."""
    listed = model.policy.config.eos_token_id
    return {model.config.eos_id} | set(listed if isinstance(listed, list) else [])


def rollout(model, question, noise=None, row=0, max_tokens=16, temperature=1.0):
    """One question, one row: latents (list of (c, d)), answer tokens, and each decision's log-probability."""
    cfg, policy = model.config, model.policy
    seq = embed(policy, question + ([cfg.start_id] if cfg.latent else []))
    plan, latent_logp, stop_logp = [], [], []
    for k in range(cfg.max_steps if cfg.latent else 0):
        step, logps, stopping = [], [], False
        for j in range(cfg.thoughts_per_step):
            z, mu, logvar = next_latent(model, seq, None if noise is None else noise.latent[row, k, j], read)
            if cfg.vae:
                normal = torch.distributions.Normal(mu, (logvar / 2).exp())
                logps.append(float(normal.log_prob(z).sum()))
            if j == 0 and cfg.stop:
                logp = stop_head(model, z)
                greedy = noise is None or temperature < 1e-3
                stopping = float(logp[1].exp()) > (0.5 if greedy else float(noise.stop[row, k]))
                stop_logp.append(float(logp[int(stopping)]))
                if stopping:
                    break
            step.append(z)
            seq.append(z)
        if stopping:
            break
        plan.append(torch.stack(step))
        latent_logp.append(logps)
    if cfg.latent:
        seq += embed(policy, [cfg.end_id])
    tokens, token_logp = [], []
    for i in range(max_tokens):
        logits = log_probs(policy, read(policy, seq))[:cfg.vocab_size] / temperature
        tokens.append(pick(logits, None if noise is None else float(noise.answer[row, i])))
        token_logp.append(float(logits.log_softmax(0)[tokens[-1]]))
        seq += embed(policy, [tokens[-1]])
        if tokens[-1] in ends(model):
            break
    return plan, tokens, latent_logp, stop_logp, token_logp


# --- supervised losses (paper, section 3.2) ---

def used_steps(config, example, stage):
    """How many of an example's steps are latent at a stage of the curriculum."""
    if not config.latent:
        return 0
    n = min(stage, config.max_steps)
    return min(n, len(example.steps)) if config.stop else n  # without a stop head every plan is equally long


def text_left(config, example, stage):
    """The tokens that are asked for: steps that are still text, then the answer, which ends with <eos>."""
    if config.method == "nocot" or config.latent and stage > config.max_steps:
        return example.answer
    written = example.steps[used_steps(config, example, stage):]
    return [token for step in written for token in step] + example.answer


def step_words(config, example, k, stage):
    """What the decoder must write from latent step k = 0, 1, .."""
    if k >= len(example.steps):  # an idle step, where there is no stop head
        return example.answer
    last_stands_for_the_rest = stage > config.max_steps and k == config.max_steps - 1
    written = example.steps[k:] if last_stands_for_the_rest else [example.steps[k]]
    return [token for step in written for token in step] + [config.eos_id]


def negative_log_likelihood(llama, inputs, tokens, read):
    """Summed over the tokens, each read back."""
    total = 0
    for token in tokens:
        total = total - log_probs(llama, read(llama, inputs))[token]
        inputs = inputs + embed(llama, [token])
    return total


def kl_to_standard_normal(mu, logvar):
    """KL(N(mu, sigma^2) || N(0, 1)), mean over the dimensions, by its definition E[log p - log q]."""
    total = 0
    for m, v in zip(mu, logvar.exp()):
        total = total + (v + m * m) / 2 - (1 + v.log()) / 2
    return total / len(mu)


def sft_losses(model, example, stage, noise=None, read=read):
    """The loss parts of one example, and how many tokens are asked for. noise: (K or more, c, d).

    Sums over steps are divided by the stage's steps, min(stage, K), however many of them the example uses.
    "answer" is a sum over tokens."""
    config, policy = model.config, model.policy
    n, planned = used_steps(config, example, stage), min(stage, config.max_steps) if config.latent else 0
    seq, losses = embed(policy, example.question), {}
    if planned:
        seq, plan = seq + embed(policy, [config.start_id]), []
        stop, kl = 0, 0
        for k in range(planned):
            if k > n:
                break
            step = []
            for j in range(config.thoughts_per_step):
                z, mu, logvar = next_latent(model, seq, noise[k, j] if config.vae else None, read)
                if j == 0 and config.stop:  # asked at a step that is used, and at the one after the last
                    stop = stop - stop_head(model, z)[0 if k < n else 1]
                if k == n:  # dropped: it takes up no position
                    break
                if config.vae:
                    kl = kl + kl_to_standard_normal(mu, logvar)
                step.append(z)
                seq = seq + [z]
            if k < n:
                plan.append(step)
        seq = seq + embed(policy, [config.end_id])
        if config.stop:
            losses["stop"] = stop / planned
        if config.vae:
            losses["kl"] = kl / (config.thoughts_per_step * planned)
        if config.decode:
            decode = 0
            for k, step in enumerate(plan):
                words = step_words(config, example, k, stage)
                decode = decode + negative_log_likelihood(model.decoder, step, words, read)
            losses["decode"] = decode / planned
    text = text_left(config, example, stage)
    losses["answer"] = negative_log_likelihood(policy, seq, text, read)
    return losses, len(text)


def batch_losses(model, examples, stage, noise=None, read=read):
    """{answer, and what the method has of decode, stop and kl} of a batch. noise: (B, K or more, c, d)."""
    total, tokens = {}, 0
    for b, example in enumerate(examples):
        losses, asked = sft_losses(model, example, stage, None if noise is None else noise[b], read)
        tokens += asked
        for part, value in losses.items():
            total[part] = total.get(part, 0) + value
    return {part: value / (tokens if part == "answer" else len(examples)) for part, value in total.items()}


# --- the RL objective (paper, section 3.3) ---

def advantages(rewards, group):
    """(r - mean) / (std + 1e-8) of each group, with the deviation of a sample (N - 1). 0 where all are equal."""
    result = []
    for start in range(0, len(rewards), group):
        r = rewards[start:start + group]
        mean = sum(r) / group
        deviation = math.sqrt(sum((x - mean) ** 2 for x in r) / (group - 1)) if group > 1 else 0.0
        for x in r:
            result.append(0.0 if min(r) == max(r) else (x - mean) / (deviation + 1e-8))
    return result


def log_density(z, mu, logvar):
    """log N(z; mu, sigma^2), summed over the dimensions."""
    total = 0
    for x, m, v in zip(z, mu, logvar.exp()):
        total = total - (x - m) ** 2 / (2 * v) - torch.log(2 * math.pi * v) / 2
    return total


def stopping_latent(model, question, plan, noise, row, read=read):
    """The latent at which a rollout chose to stop, drawn after its plan (list of (c, d))."""
    seq = embed(model.policy, question + [model.config.start_id]) + [z for step in plan for z in step]
    return next_latent(model, seq, noise.latent[row, len(plan), 0], read)[0]


def choices(model, question, plan, stop_z, tokens, read=read):
    """Log-probabilities of a rollout's choices, the latents held fixed: a list for the latent side, and one for
    the tokens. plan: list of (c, d). stop_z: where it chose to stop, None where it ran into K."""
    config, policy = model.config, model.policy
    seq, latents, words = embed(policy, question), [], []
    if config.latent:
        seq = seq + embed(policy, [config.start_id])
    for step in plan:
        for j, z in enumerate(step):
            if config.vae:
                _, mu, logvar = next_latent(model, seq, None, read)
                latents.append(log_density(z, mu, logvar))
                if j == 0 and config.stop:
                    latents[-1] = latents[-1] + stop_head(model, z)[0]
            seq = seq + [z]
    if stop_z is not None:
        latents.append(stop_head(model, stop_z)[1])
    if config.latent:
        seq = seq + embed(policy, [config.end_id])
    for token in tokens:
        words.append(log_probs(policy, read(policy, seq))[token])
        seq = seq + embed(policy, [token])
    return latents, words


def clipped_gain(new, old, advantage):
    """PPO's: the smaller of ratio x advantage and clipped ratio x advantage."""
    ratio = (new - old).clamp(-3, 3).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


def objective(new, old, rewards, group):
    """The loss of rollouts. new, old: a pair of lists each, as `choices` gives them, by the weights now and
    before."""
    total = 0
    for now, before, advantage in zip(new, old, advantages(rewards, group)):
        for side in (0, 1):
            gains = [clipped_gain(a, b, advantage) for a, b in zip(now[side], before[side])]
            if gains:
                total = total + sum(gains) / len(gains)
    return -total / len(new)
