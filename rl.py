"""Active planning: GRPO in latent space (paper, section 3.3). Start at rl_step.

Departures from the paper and its released code (README has them all):
1. Coherence compares numbers, not substrings. An unparsable step is incoherent, an empty plan scores 0.
2. --latent_grad path sends gradients through the latents instead of treating them as actions.
3. log p(stop) is a term of the latent side. (Released: in the place of the forced <|end-latent|>.)
4. A minibatch has equally many rollouts of each question. (Released: random ones.)
5. A batch in which no group's rewards differ makes no step, with a KL term neither.
"""

import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn

from data import extract_answer, is_correct, numbers_equal, parse_number, parse_step, well_formed
from model import length_mask
from vae import RL_NOISE, Noise, gaussian_kl, gaussian_logp, generator, precise


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


def compute_rewards(model, rollout, examples, tokenizer, cfg):
    """The rewards and their parts, float tensors (B,) on the CPU. Row b answers examples[b // group]. Only
    plans of right answers are decoded; all with --w_acc 0, where no label is used."""
    texts, ended = model.texts(rollout.tokens, rollout.lengths, tokenizer)
    correct = [is_correct(text, examples[b // rollout.group]) for b, text in enumerate(texts)]
    form = [end and well_formed(text) for text, end in zip(texts, ended)]
    correct, form = torch.tensor(correct).float(), torch.tensor(form).float()
    coherent, decoded = torch.zeros(2, len(texts))
    if model.decoder is not None and cfg.w_coh:
        decoded = correct if cfg.w_acc else torch.ones_like(correct)
        rows = decoded.nonzero().flatten().tolist()
        plans = model.plan_texts(rollout.plan.z[rows], rollout.plan.steps[rows], tokenizer)
        for row, plan in zip(rows, plans):
            coherent[row] = coherence(plan, extract_answer(texts[row]))
    reward = cfg.w_acc * correct + cfg.w_fmt * form + cfg.w_coh * coherent
    return dict(reward=reward, accuracy=correct, well_formed=form, coherence=coherent, decoded=decoded)


def group_advantages(rewards, cfg):
    """r - mean in each group, with --std_norm divided by the unbiased deviation. (B,) -> (B,)."""
    r = rewards.view(-1, cfg.group)
    a = r - r.mean(1, keepdim=True)
    if cfg.std_norm:
        a = a / (r.std(1, keepdim=True) + 1e-8)
    equal = (r == r[:, :1]).all(1, keepdim=True)  # their mean may be off by rounding
    return a.masked_fill(equal, 0.0).flatten()


# --- objective ---

class Terms(NamedTuple):
    """Log-probabilities of a rollout's choices (None: no choice) and the distributions of its latents."""

    latent: torch.Tensor | None  # (B, N, c) density
    stop: torch.Tensor | None    # (B, N + 1) continue or, at `steps`, stop
    token: torch.Tensor          # (B, A)
    mu: torch.Tensor | None = None  # (B, N, c, d), None if `latent` is
    logvar: torch.Tensor | None = None

    def detached(self):
        return Terms(*(v if v is None else v.detach() for v in self))


class LogProbs(nn.Module):
    """forward(Rollout): its Terms under the current weights. A module, so that DDP can wrap it.

    latent_grad score, the paper's: latents are actions, held fixed, with densities (but for the one at which
    a row stopped). path, ours: they are drawn again from the same noise, with gradients through them into
    stops and tokens."""

    def __init__(self, model, latent_grad):
        super().__init__()
        self.model, self.path = model, latent_grad == "path"
        if not self.path and model.latent_head is not None and not model.config.vae:
            model.latent_head.requires_grad_(False)  # no density, no gradient: DDP would wait for one

    def forward(self, rollout):
        policy, config, plan = self.model.policy, self.model.config, rollout.plan
        (N, c), A = plan.z.shape[1:3], rollout.tokens.shape[1]
        written = length_mask(rollout.lengths, A)
        h, cache = self.model.read_questions(rollout.prefix, N * c + A, rollout.group)  # (B, d)
        # a token's probability is read at the input before it: <|end-latent|> or, without latents, the prefix
        skip = 0 if config.latent else 1
        text = nn.functional.pad(rollout.tokens[:, :-1], (1, 0), value=config.end_id)[:, skip:]
        text = policy.embed_tokens(text)
        latent = stop = mu = logvar = None
        stop_z = plan.stop_z
        if config.latent and self.path:  # think puts its latents into the cache
            stop_z = self.model.think(h, cache, N, plan.steps, rollout.eps).stop_z
            h = policy.step(text, cache, written)
        else:
            inputs = torch.cat((plan.z.flatten(1, 2), text), dim=1)
            mask = torch.cat((length_mask(plan.steps * c, N * c), written[:, skip:]), dim=1)
            h = h[:, None]  # states before the first input and after each
            if inputs.shape[1]:
                h = torch.cat((h, policy.step(inputs, cache, mask)), dim=1)
            if config.vae:
                mu, logvar = self.model.latent(h[:, :N * c].unflatten(1, (N, c)))
                latent = gaussian_logp(plan.z, mu, logvar) * length_mask(plan.steps, N)[..., None]
        if config.stop:
            go, halt = self.model.stop_logits(stop_z).log_softmax(dim=-1).unbind(dim=-1)
            chosen = torch.where(length_mask(plan.steps, N + 1), go, halt)
            stop = chosen * length_mask(plan.steps + plan.stopped, N + 1)
        logits = precise(policy.logits(h[:, -A:])[..., :config.vocab_size])
        token = logits.log_softmax(dim=-1).gather(-1, rollout.tokens[..., None]).squeeze(-1)
        return Terms(latent, stop, token * written, mu, logvar)


def masked_mean(x, mask):
    """Mean (B,) of x (B, ...) where the mask is set, or 0."""
    return (x * mask).flatten(1).sum(dim=1) / mask.flatten(1).sum(dim=1).clamp(min=1)


def divergence(new, reference, rollout):
    """KL(policy || reference) of each rollout (B,): the sum of three means. Over latents (by score): closed
    form, summed over d. Over stops and over tokens: q/p - log q/p - 1, p the policy, q the reference (GRPO,
    arXiv 2402.03300, equation 4), whose mean over samples of p is KL(p || q)."""
    steps, parts = rollout.plan.steps, []
    if new.mu is not None:  # KL is invariant to scale: rescaled so that the reference is N(0, I)
        mu = (new.mu - reference.mu) * torch.exp(-0.5 * reference.logvar)
        kl = gaussian_kl(mu, new.logvar - reference.logvar) * mu.shape[-1]  # (B, N, c)
        parts.append(masked_mean(kl, length_mask(steps, kl.shape[1])[..., None].expand_as(kl)))
    for p, q, choices in ((new.token, reference.token, rollout.lengths),
                          (new.stop, reference.stop, steps + rollout.plan.stopped)):
        if p is not None:
            log_ratio = q - p
            most = log_ratio.clamp(max=10)  # the estimate is linear beyond 10: the pull grows no more
            estimate = most.exp() * (1 + (log_ratio - most)) - log_ratio - 1
            parts.append(masked_mean(estimate, length_mask(choices, p.shape[1])))
    return sum(parts)


def latent_log_ratio(new, old, rollout, latent_mean):
    """Log-ratios (B, terms) of the choices in latent space, and which count; None without any. Each latent's
    density, with log p(continue) added at the first of a reasoning step, then log p(stop). Without densities
    each p(continue) is a term."""
    (N, c, d), steps, stopped = rollout.plan.z.shape[1:], rollout.plan.steps, rollout.plan.stopped
    stop_mask, terms = length_mask(steps + stopped, N + 1), []
    if new.latent is not None:
        density = (new.latent - old.latent) / (d if latent_mean else 1)  # (B, N, c)
        if new.stop is not None:
            density[..., 0] += (new.stop - old.stop)[:, :N]
            stop_mask = stop_mask & ~length_mask(steps, N + 1)
        terms.append((density.flatten(1), length_mask(steps * c, N * c)))
    if new.stop is not None:
        terms.append((new.stop - old.stop, stop_mask))
    return [torch.cat(x, dim=1) for x in zip(*terms)] if terms else None


def clipped_term(log_ratio, mask, advantages, clip):
    """PPO: the mean of min(ratio A, clip(ratio) A) over each rollout's choices (B,), and how many choices
    there are and are outside the clip."""
    ratio, A = log_ratio.clamp(-3, 3).exp(), advantages[:, None]
    gain = torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
    outside = (ratio - 1).abs() > clip
    return masked_mean(gain, mask), mask.sum(), (outside & mask).sum()


def objective(new, old, rollout, advantages, total, ratio_clip, latent_coef, latent_mean):
    """The loss, a share of the mean over `total` rollouts: minus (a term for answer tokens + latent_coef x a
    term for latents and stop). And statistics. new, old: Terms by the weights now and before the update."""
    mask = length_mask(rollout.lengths, new.token.shape[1])
    token, count, clipped = clipped_term(new.token - old.token, mask, advantages, ratio_clip)
    stats = {"token_terms": count, "token_clipped": clipped}
    loss = -token.sum() / total
    if (choices := latent_log_ratio(new, old, rollout, latent_mean)) is not None:
        latent, count, clipped = clipped_term(*choices, advantages, ratio_clip)
        stats |= {"latent_terms": count, "latent_clipped": clipped}
        loss = loss - latent_coef * latent.sum() / total
    return loss, stats


# --- one step of the loop ---

def rl_step(run, ddp, reference, optimizer, examples):
    """Rollouts of a global batch (each process its questions), rewards, optimizer steps -> statistics.
    run: train.Run. ddp: LogProbs, by DDP if there are processes. reference: LogProbs of the KL, or None."""
    cfg, model, Q, G = run.cfg, run.model, len(examples), run.cfg.group
    own, d = slice(run.rank, None, run.world), model.policy.config.hidden_size
    noise = Noise.draw(Q * G, model.config, d, cfg.max_answer, generator(cfg.seed, RL_NOISE, run.step))
    mine, noise = examples[own], Noise(*(v.unflatten(0, (Q, G))[own].flatten(0, 1) for v in noise))
    began = time.time()
    model.eval()
    with run.autocast():
        rollout = model.rollout([e.question for e in mine], G, noise, cfg.max_answer)
        rolled = time.time()
        result = compute_rewards(model, rollout, [e.example for e in mine], run.tokenizer, cfg)
    scored = time.time()
    advantages = group_advantages(result["reward"], cfg)
    result |= dict(latents=rollout.plan.steps * cfg.thoughts_per_step, advantage=advantages.abs())
    stats = run.mean({k: v.sum() * run.world / (Q * G) for k, v in result.items()})
    stats["coherence"] /= max(stats.pop("decoded"), 1 / (Q * G))  # of the plans that were decoded
    if stats["advantage"] > 0:  # AdamW would make a full step of rounding
        model.train()
        stats |= update(run, ddp, reference, optimizer, rollout, advantages)
    return stats | dict(rollout_s=rolled - began, score_s=scored - rolled, update_s=time.time() - scored)


def update(run, ddp, reference, optimizer, rollout, advantages):
    """Optimizer steps over rollouts with advantages (B,), on the CPU. Returns statistics."""
    cfg, sums, norms = run.cfg, {}, []
    log_probs = getattr(ddp, "module", ddp)  # without DDP's hooks
    minibatches = split(run, log_probs, rollout, advantages, all_groups=reference is not None)
    for minibatch in minibatches:
        for i, (part, part_advantages, old) in enumerate(minibatch):
            with run.no_sync(ddp, i + 1 < len(minibatch)):
                with run.autocast():
                    new = ddp(part)
                    # in the first minibatch the weights are still the old ones, and every ratio is 1
                    old = new.detached() if old is None else old
                    loss, stats = objective(new, old, part, part_advantages, cfg.minibatch,
                                            cfg.ratio_clip, cfg.latent_coef, cfg.latent_mean)
                    if reference is not None:
                        kl = divergence(new, reference(part), part).sum()
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
    if reference is not None:
        found["kl"] = sums["kl"] * run.world / (cfg.minibatch * len(minibatches))
    return found


def split(run, log_probs, rollout, advantages, all_groups):
    """Minibatches: lists of micro-batches (Rollout, advantages on the device, old Terms). A minibatch has
    equally many rollouts of each question, a micro-batch those of some. Groups of equal rewards are left out
    unless all_groups: only a KL term learns from them. Old Terms are of the weights before the first step,
    with gradients on, so that they round as the update does. None in the first minibatch."""
    cfg, G = run.cfg, rollout.group
    advantages = advantages.view(-1, G)
    members = cfg.minibatch // cfg.questions_per_step  # rollouts of a question in a minibatch
    questions = [q for q, row in enumerate(advantages.tolist()) if all_groups or any(row)]
    questions = questions or [0]  # DDP needs one on each process
    count = -(-len(questions) * members // max(cfg.micro_batch, members))
    parts, advantages, minibatches = np.array_split(questions, count), advantages.to(run.device), []
    for g in range(0, G, members):
        cuts = [rollout.select(part, range(g, g + members)) for part in parts]
        with run.autocast():
            old = [log_probs(cut).detached() if g else None for cut in cuts]
        minibatches.append([(cut, advantages[part, g:g + members].flatten(), terms)
                            for cut, part, terms in zip(cuts, parts, old)])
    return minibatches
