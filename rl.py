"""Active planning: GRPO in latent space (paper, section 3.3). For its departures see README.md."""

import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn

from data import extract_answer, is_correct, numbers_equal, parse_number, parse_step, well_formed
from model import KVCache, first
from vae import RL_NOISE, Noise, gaussian_kl, gaussian_logp, generator, masked_mean, precise


# --- rewards ---

def coherence(steps, answer):
    """Share of coherent steps of a plan (decoded texts) with an answer (text or None), or 0. A step is
    coherent if a later one uses its result; the last, if its result is the answer."""
    wanted, later, coherent = [parse_number(answer or "")], [], 0
    for text in reversed(steps):
        operands, result = parse_step(text) or ([], None)
        coherent += any(numbers_equal(result, x) for x in wanted if None not in (result, x))
        later = later + operands
        wanted = later
    return coherent / max(1, len(steps))


def score(model, rollout, examples, tokenizer, w_acc=1.0, w_fmt=0.5, w_coh=0.1):
    """The reward and its parts, float tensors (B,) on the CPU. Row b answers examples[b // group]. Only plans
    of right answers are decoded; all with w_acc 0, where no label is used."""
    texts, ended = model.texts(rollout.tokens, rollout.lengths, tokenizer)
    correct = [is_correct(text, examples[b // rollout.group]) for b, text in enumerate(texts)]
    form = [end and well_formed(text) for text, end in zip(texts, ended)]
    correct, form = torch.tensor(correct).float(), torch.tensor(form).float()
    coherent, decoded = torch.zeros(2, len(texts))
    if model.decoder is not None and w_coh:
        decoded = correct if w_acc else torch.ones_like(correct)
        rows = decoded.nonzero().flatten().tolist()
        plans = model.plan_texts(rollout.plan.z[rows], rollout.plan.steps[rows], tokenizer)
        for row, plan in zip(rows, plans):
            coherent[row] = coherence(plan, extract_answer(texts[row]))
    reward = w_acc * correct + w_fmt * form + w_coh * coherent
    return dict(reward=reward, accuracy=correct, well_formed=form, coherence=coherent, decoded=decoded)


def advantages(reward, group, std=True):
    """(r - mean) / (std + 1e-4) in each group of rows; std=False: r - mean. (B,) -> (B,)."""
    r = reward.view(-1, group)
    a = r - r.mean(1, keepdim=True)
    if std:
        a = a / (r.std(1, correction=0, keepdim=True) + 1e-4)
    equal = (r == r[:, :1]).all(1, keepdim=True)  # their mean may be off by rounding
    return a.masked_fill(equal, 0.0).flatten()


# --- objective ---

class Terms(NamedTuple):
    """Log-probabilities of a rollout's choices (None: no choice) and the distributions of its latents."""

    latent: torch.Tensor | None  # (B, N, c) density
    stop: torch.Tensor | None    # (B, N + 1) continue or, at `steps`, stop
    token: torch.Tensor          # (B, A)
    mu: torch.Tensor | None = None  # (B, N, c, d), beside `latent`
    logvar: torch.Tensor | None = None

    def detached(self):
        return Terms(*(v if v is None else v.detach() for v in self))


class LogProbs(nn.Module):
    """forward(Rollout): its Terms under the current weights. A module, so that DDP can wrap it.

    latent_grad score, the paper's: latents are actions, held fixed, with densities (but for the one at which
    a row stopped). path, ours: they are drawn again from the same noise, with gradients through them into
    stops and tokens."""

    def __init__(self, model, latent_grad="score"):
        super().__init__()
        self.model, self.path = model, latent_grad == "path"
        if not self.path and model.latent_head is not None and not model.config.vae:
            model.latent_head.requires_grad_(False)  # fixed latents without a density

    def forward(self, rollout):
        policy, config, plan = self.model.policy, self.model.config, rollout.plan
        (N, c), A = plan.z.shape[1:3], rollout.tokens.shape[1]
        cache, written = KVCache(N * c + A, rollout.group), first(rollout.lengths, A)
        h = self.model.read(rollout.prefix, cache)  # (B, d)
        skip = 0 if config.latent else 1  # the prefix gives the first token
        text = nn.functional.pad(rollout.tokens[:, :-1], (1, 0), value=config.end_id)[:, skip:]
        latent = stop = mu = logvar = None
        stop_z = plan.stop_z
        if config.latent and self.path:  # the cache keeps the latents
            stop_z = self.model.think(h, cache, N, plan.steps, rollout.eps).stop_z
            h = policy.hidden(text, cache=cache, valid=written)
        else:
            text = policy.embed_tokens(text)
            inputs = torch.cat((plan.z.flatten(1, 2), text), dim=1)
            valid = torch.cat((first(plan.steps * c, N * c), written[:, skip:]), dim=1)
            h = h[:, None]  # and the state after each input
            if inputs.shape[1]:
                h = torch.cat((h, policy.hidden(embeds=inputs, cache=cache, valid=valid)), dim=1)
            if config.vae:
                mu, logvar = self.model.latent(h[:, :N * c].unflatten(1, (N, c)))
                latent = gaussian_logp(plan.z, mu, logvar) * first(plan.steps, N)[..., None]
        if config.stop:
            go, halt = self.model.stop_logits(stop_z).log_softmax(dim=-1).unbind(dim=-1)
            stop = torch.where(first(plan.steps, N + 1), go, halt) * first(plan.steps + plan.stopped, N + 1)
        logits = precise(policy.logits(h[:, -A:])[..., :config.vocab_size])
        token = logits.log_softmax(dim=-1).gather(-1, rollout.tokens[..., None]).squeeze(-1)
        return Terms(latent, stop, token * written, mu, logvar)


def divergence(new, reference, rollout):
    """KL(policy || reference) of each rollout (B,): the sum of three means. Over latents (by score): closed
    form, summed over d. Over stops and over tokens: q/p - log q/p - 1, p the policy, q the reference (GRPO,
    arXiv 2402.03300, equation 4), whose mean over samples of p is KL(p || q)."""
    steps, parts = rollout.plan.steps, []
    if new.mu is not None:  # in the units of the reference, which is N(0, 1) there
        mu = (new.mu - reference.mu) * torch.exp(-0.5 * reference.logvar)
        kl = gaussian_kl(mu, new.logvar - reference.logvar) * mu.shape[-1]  # (B, N, c)
        parts.append(masked_mean(kl, first(steps, kl.shape[1])[..., None].expand_as(kl)))
    for p, q, choices in ((new.token, reference.token, rollout.lengths),
                          (new.stop, reference.stop, steps + rollout.plan.stopped)):
        if p is not None:
            log_ratio = q - p
            most = log_ratio.clamp(max=10)  # beyond, its tangent: the pull grows no more
            estimate = most.exp() * (1 + (log_ratio - most)) - log_ratio - 1
            parts.append(masked_mean(estimate, first(choices, p.shape[1])))
    return sum(parts)


def objective(new, old, rollout, advantage, total, clip=0.2, latent_coef=1.0, latent_mean=False):
    """PPO-clipped loss, a share of the mean over `total` rollouts, and statistics. new, old: Terms of the
    weights now and before the update. In each rollout latents and stop, and tokens, are averaged apart."""
    (N, c, d), steps, stopped = rollout.plan.z.shape[1:], rollout.plan.steps, rollout.plan.stopped
    stops, pairs = first(steps + stopped, N + 1), []  # pairs: (difference of log-probabilities, mask)
    if new.latent is not None:
        density = (new.latent - old.latent) / (d if latent_mean else 1)  # (B, N, c)
        if new.stop is not None:  # log p(continue) belongs to the first latent of its step
            density[..., 0] += (new.stop - old.stop)[:, :N]
            stops = stops & ~first(steps, N + 1)
        pairs.append((density.flatten(1), first(steps * c, N * c)))
    if new.stop is not None:
        pairs.append((new.stop - old.stop, stops))
    sides = {"token": (new.token - old.token, first(rollout.lengths, new.token.shape[1]), 1.0)}
    if pairs:
        sides["latent"] = *(torch.cat(x, dim=1) for x in zip(*pairs)), latent_coef
    loss, stats, a = 0, {}, advantage[:, None]
    for name, (diff, mask, coef) in sides.items():
        ratio = diff.clamp(-3, 3).exp()
        gain = torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
        loss = loss - coef * masked_mean(gain, mask).sum() / total
        outside = (ratio - 1).abs() > clip
        stats |= {f"{name}_terms": mask.sum(), f"{name}_clipped": (outside & mask).sum()}
    return loss, stats


# --- one step of the loop ---

def rl_step(run, ddp, reference, optimizer, examples):
    """Rollouts of a global batch (each process its questions), rewards, optimizer steps. Returns statistics.
    No step where no group's rewards differ: AdamW would make a full one of the KL's rounding."""
    cfg, model, Q, G = run.cfg, run.model, len(examples), run.cfg.group
    own, d = slice(run.rank, None, run.world), model.policy.config.hidden_size
    noise = Noise.draw(Q * G, model.config, d, cfg.max_answer, generator(cfg.seed, RL_NOISE, run.step))
    mine, noise = examples[own], Noise(*(v.unflatten(0, (Q, G))[own].flatten(0, 1) for v in noise))
    began = time.time()
    model.eval()
    with run.autocast():
        rollout = model.rollout([e.question for e in mine], G, noise, cfg.max_answer)
        rolled = time.time()
        result = score(model, rollout, [e.example for e in mine], run.tokenizer, cfg.w_acc, cfg.w_fmt,
                       cfg.w_coh)
    scored = time.time()
    advantage = advantages(result["reward"], G, cfg.std_norm)
    result |= dict(latents=rollout.plan.steps * cfg.thoughts_per_step, advantage=advantage.abs())
    stats = run.mean({k: v.sum() * run.world / (Q * G) for k, v in result.items()})
    stats["coherence"] /= max(stats.pop("decoded"), 1 / (Q * G))  # of the plans that were decoded
    if stats["advantage"] > 0:
        model.train()
        stats |= update(run, ddp, reference, optimizer, rollout, advantage)
    return stats | dict(rollout_s=rolled - began, score_s=scored - rolled, update_s=time.time() - scored)


def update(run, ddp, reference, optimizer, rollout, advantage):
    """Optimizer steps over rollouts with advantages (B,), on the CPU. Returns statistics. Each step takes as
    many rollouts of every question, each micro-batch those of some."""
    cfg, G, log_probs = run.cfg, rollout.group, getattr(ddp, "module", ddp)
    members = cfg.minibatch // cfg.questions_per_step  # of each group in a step
    advantage, batches = advantage.view(-1, G), []  # a batch: its micro-batches
    # equal rewards teach only the KL; DDP needs a question
    active = [q for q, a in enumerate(advantage.tolist()) if reference or any(a)] or [0]
    most = max(cfg.micro_batch or cfg.minibatch, members)
    parts = np.array_split(active, -(-len(active) * members // most))
    advantage = advantage.to(run.device)
    for g in range(0, G, members):
        cuts = [rollout.part(part, range(g, g + members)) for part in parts]
        gains = [advantage[part, g:g + members].flatten() for part in parts]
        with run.autocast():  # by the update's kernels, so not under no_grad: the rollout rounds otherwise
            old = [log_probs(cut).detached() if g else None for cut in cuts]
        batches.append(list(zip(cuts, gains, old)))
    sums, norms = {}, []
    for batch in batches:
        for i, (cut, a, old) in enumerate(batch):
            with run.no_sync(ddp, i + 1 < len(batch)):
                with run.autocast():
                    new = ddp(cut)
                    old = new.detached() if old is None else old
                    loss, stats = objective(new, old, cut, a, cfg.minibatch, cfg.ratio_clip,
                                            cfg.latent_coef, cfg.latent_mean)
                    if reference:
                        kl = divergence(new, reference(cut), cut).sum()
                        loss, stats["kl"] = loss + cfg.kl_coef * kl / cfg.minibatch, kl.detach()
                (loss * run.world).backward()  # DDP takes the mean; the losses are shares of a sum
            sums = {k: sums.get(k, 0) + v for k, v in stats.items()}
        norms.append(run.clip_gradients(optimizer, cfg.rl_grad_clip))
        optimizer.step()
        optimizer.zero_grad()
    sums, found = run.mean(sums), {"grad_norm": float(np.mean(norms))}
    for side in ("latent", "token"):
        if f"{side}_terms" in sums:
            found[f"{side}_clip_frac"] = sums[f"{side}_clipped"] / sums[f"{side}_terms"]
    if reference:
        found["kl"] = sums["kl"] * run.world / (cfg.minibatch * len(batches))
    return found
