"""Active planning: GRPO in latent space, rewarded by the right answer and by coherence.

Where this departs from the paper's released code:
1. Coherence compares numbers as numbers. A step that does not parse is incoherent, and an empty plan scores
   0. (There, an unparsable step matches everything and an empty plan scores 1: it invites reward hacking.)
2. Gradients are averaged over processes. (There, RL bypasses DDP and the processes drift apart.)
3. log p(stop) stands beside the latents' terms, and <eos> counts as a token of the answer. (There, log
   p(stop) takes the place of the first answer token's term, and <eos> is masked.)
4. Gradients can flow through the chain of latents (`path` in LogProbs).
5. The policy can be held near the one that RL began with (`divergence`).
"""

import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn

from data import extract_answer, is_correct, numbers_equal, parse_number, parse_step, well_formed
from model import KVCache, first
from vae import (RL_NOISE, Noise, gaussian_kl, gaussian_logp, generator, last, masked_mean, precise,
                 stop_places, stop_terms)


# --- rewards ---

def coherence(steps, answer):
    """Share of coherent steps of one plan, 0 to 1 (paper, section 3.3). steps: decoded texts; answer: text
    or None.

    Step k is coherent when its result is an operand of some later step; the last one when its result is the
    predicted answer. A step that does not parse is incoherent. No step at all scores 0."""
    parsed = [parse_step(s) for s in steps]
    answer = None if answer is None else parse_number(answer)
    coherent = 0
    for k, step in enumerate(parsed):
        if step is None:
            continue
        if k + 1 == len(parsed):
            wanted = [] if answer is None else [answer]
        else:
            wanted = [x for later in parsed[k + 1:] if later is not None for x in later[0]]
        coherent += any(numbers_equal(step[1], x) for x in wanted)
    return coherent / len(steps) if steps else 0.0


def score(model, rollout, examples, tokenizer, w_acc=1.0, w_fmt=0.5, w_coh=0.1):
    """Reward of each rollout and its parts (paper, equation of section 3.3), a dict of float tensors (B,):
    reward, accuracy, well_formed, coherence (0 where the plan was not decoded), decoded (1 where it was).
    examples[b // group] is row b's question.

    w_acc 0 is the coherence-only mode: the answer label is not used. Else only the plans of right answers are
    decoded, since the coherence of others earns nothing."""
    texts, ended = model.answer_texts(rollout, tokenizer)
    examples = [e for e in examples for _ in range(rollout.group)]
    correct = torch.tensor([float(is_correct(t, e)) for t, e in zip(texts, examples)])
    form = torch.tensor([float(e and well_formed(t)) for t, e in zip(texts, ended)])
    coherent, decoded = torch.zeros(len(texts)), torch.zeros(len(texts))
    if model.decoder is not None and (w_coh or not w_acc):
        decoded = correct if w_acc > 0 else torch.ones(len(texts))
        rows = decoded.nonzero().flatten()
        at = rows.to(rollout.z.device)
        plans = model.plan_texts(rollout.z[at], rollout.steps[at], tokenizer)
        answers = [extract_answer(texts[i]) for i in rows.tolist()]
        coherent[rows] = torch.tensor([coherence(p, a) for p, a in zip(plans, answers)])
    reward = w_acc * correct + w_fmt * form + w_coh * coherent
    return dict(reward=reward, accuracy=correct, well_formed=form, coherence=coherent, decoded=decoded)


def advantages(reward, group, std=True, eps=1e-4):
    """(r - mean) / (std + eps) within each group of consecutive rows (B,). std=False leaves the division
    out."""
    r = reward.view(-1, group)
    a = r - r.mean(dim=1, keepdim=True)
    if std:
        a = a / (r.std(dim=1, keepdim=True, unbiased=False) + eps)
    # equal rewards teach nothing; their mean may still be off by rounding
    equal = r.amax(dim=1, keepdim=True) == r.amin(dim=1, keepdim=True)
    return a.masked_fill(equal, 0.0).flatten()


# --- objective ---

class Terms(NamedTuple):
    """Log-probabilities of what a rollout chose, and the distributions of its latents. None: nothing to
    choose."""

    latent: torch.Tensor | None  # (B, N, c) density of each latent
    stop: torch.Tensor | None    # (B, N + 1) continue at steps 0 .. steps - 1, stop at `steps`
    token: torch.Tensor          # (B, A)
    mu: torch.Tensor | None = None      # (B, N, c, d), of fixed latents that were sampled
    logvar: torch.Tensor | None = None  # likewise

    def detached(self):
        return Terms(*(None if v is None else v.detach() for v in self))


class LogProbs(nn.Module):
    """forward(Rollout): its Terms under the current weights. A module of its own, so that DDP can wrap it.

    Two gradients of the expected reward (Config.latent_grad). `score`, the paper's: latents are actions,
    held fixed, with their log-densities; one parallel pass over question, sampled latents and answer. It
    leaves out the density of the latent at which a row stopped. `path`, ours: latents are drawn again, one
    position at a time, from the noise of the rollout, and gradients flow through z = mu + sigma eps and the
    chain of latents into the log-probabilities of the stops and tokens chosen. It is unbiased if the reward
    depends only on these. Coherence also depends on the latents; path credits it only to the stops and
    tokens chosen."""

    def __init__(self, model, temperature=1.0, latent_grad="score", latent_temperature=1.0):
        super().__init__()
        self.model = model
        self.temperature, self.latent_temperature = temperature, latent_temperature
        self.path = latent_grad == "path"
        if not self.path and model.latent_head is not None and not model.config.vae:
            model.latent_head.requires_grad_(False)  # fixed latents without a density

    def forward(self, rollout, fixed=False):
        """Terms, with gradients; by path without latent, mu and logvar. fixed: of the latents as they are, by
        path too."""
        policy, config = self.model.policy, self.model.config
        B, N, c, _ = rollout.z.shape
        A = rollout.tokens.shape[1]
        cache = KVCache(N * c + A, rollout.group)
        h0 = policy.hidden(rollout.prefix, cache=cache, valid=rollout.prefix_valid)
        h0 = last(h0, rollout.prefix_valid).repeat_interleave(rollout.group, dim=0)
        written = first(rollout.lengths, A)
        latent = stop = mu = logvar = None
        if config.latent and self.path and not fixed:
            plan = self.model.think(h0, cache, rollout.steps, N, rollout.eps)
            h = policy.hidden(self.text(rollout), cache=cache, valid=written)
            if plan.stop_logits is not None:
                stop = stop_terms(plan.stop_logits, rollout.steps, rollout.stopped)
        elif config.latent:
            text = policy.embed_tokens(self.text(rollout))
            inputs = torch.cat((rollout.z.flatten(1, 2).to(text.dtype), text), dim=1)
            used = first(rollout.steps, N).repeat_interleave(c, dim=1)
            h = policy.hidden(embeds=inputs, cache=cache, valid=torch.cat((used, written), dim=1))
            before = torch.cat((h0[:, None], h[:, :N * c]), dim=1)[:, :N * c].unflatten(1, (N, c))
            latent, mu, logvar = self.density(rollout, before)
            stop, h = self.stops(rollout), h[:, N * c:]
        else:  # the first token is chosen at the end of the prefix
            h = h0[:, None]
            if A > 1:
                more = policy.hidden(rollout.tokens[:, :-1], cache=cache, valid=written[:, 1:])
                h = torch.cat((h, more), dim=1)
        logits = precise(policy.logits(h)[..., :config.vocab_size]) / self.temperature
        token = logits.log_softmax(dim=-1).gather(-1, rollout.tokens[..., None]).squeeze(-1)    # (B, A)
        return Terms(latent, stop, token * written, mu, logvar)

    def text(self, rollout):
        """(B, A): <|end-latent|> and all answer tokens but the last."""
        end = torch.full_like(rollout.tokens[:, :1], self.model.config.end_id)
        return torch.cat((end, rollout.tokens[:, :-1]), dim=1)

    def density(self, rollout, before):
        """log-density, mu and logvar of the latents as they were sampled. before (B, N, c, d): the states
        before them."""
        if not self.model.config.vae:
            return None, None, None
        mu, logvar = self.model.latent(before)
        wide = logvar + 2 * np.log(self.latent_temperature)
        used = first(rollout.steps, rollout.z.shape[1])
        return gaussian_logp(rollout.z, mu, wide) * used[..., None], mu, logvar

    def stops(self, rollout):
        """Terms.stop of the latents as they were sampled."""
        if rollout.stop_z is None:
            return None
        seen = torch.cat((rollout.z[:, :, 0], rollout.stop_z[:, None]), dim=1)             # (B, N + 1, d)
        here = stop_places(rollout.steps, rollout.stopped, seen.shape[1])
        seen = torch.where(here[..., None], rollout.stop_z[:, None], seen)
        logits = self.model.stop_head(seen.to(self.model.policy.embed_tokens.weight.dtype))
        return stop_terms(precise(logits), rollout.steps, rollout.stopped)


def divergence(new, reference, rollout):
    """KL(policy || reference) of each rollout (B,), from Terms of both. The rollout was drawn from the
    policy, so the estimate of its direction is the forward one of GRPO: what the policy does, measured by
    the reference.

    Latents: closed form, summed over d, mean over the latents used. Stops and tokens: the never-negative
    estimate q/p - log q/p - 1 with p the policy and q the reference (Schulman,
    http://joschu.net/blog/kl-approx.html; GRPO, arXiv 2402.03300, equation 4), means over each. Its mean
    over samples of p is KL(p || q). Its gradient, with the samples held fixed, is that of KL(q || p): it
    pulls p up wherever q puts more weight."""
    steps, N = rollout.steps, rollout.z.shape[1]
    sides = []
    if new.mu is not None:
        used = first(steps, N)[..., None].expand(new.mu.shape[:3])
        # in the units of the reference, which is N(0, 1) there
        mu = (new.mu - reference.mu) * torch.exp(-0.5 * reference.logvar)
        logvar = new.logvar - reference.logvar
        sides.append((gaussian_kl(mu, logvar) * mu.shape[-1], used))
    choices = [(new.token, reference.token, first(rollout.lengths, new.token.shape[1]))]
    if new.stop is not None:
        taken = first(steps, N + 1) | stop_places(steps, rollout.stopped, N + 1)
        choices.append((new.stop, reference.stop, taken))
    for p, q, mask in choices:
        log_ratio = q - p
        # beyond 10 the exponential goes on as its tangent: the pull grows no more
        most = log_ratio.clamp(max=10)
        sides.append((most.exp() * (1 + (log_ratio - most)) - log_ratio - 1, mask))
    return sum(masked_mean(kl, mask) for kl, mask in sides)


def objective(new, old, rollout, advantage, total, clip=0.2, latent_coef=1.0, latent_mean=False):
    """PPO-clipped loss (paper, section 3.3), this part's share of the mean over `total` rollouts, and
    statistics.

    new, old: Terms under the current weights and under those that drew the rollout. advantage (B,). On one
    side stand each latent (its density, and at the first of a step log p(continue)) and the stop, on the
    other each answer token. Log-ratios are clamped to +-3. Masked mean per rollout over either side, the
    two added. latent_mean: the density is averaged, not summed, over the d dimensions. latent_coef: weight
    of the latent side. The paper has False and 1."""
    steps, N, c = rollout.steps, rollout.z.shape[1], rollout.z.shape[2]
    used = first(steps, N)
    ends = stop_places(steps, rollout.stopped, N + 1)
    diffs, masks = [], []
    go_on = None if new.stop is None else new.stop - old.stop
    if new.latent is not None:
        diff = new.latent - old.latent
        diff = diff / rollout.z.shape[-1] if latent_mean else diff
        if go_on is not None:  # log p(continue) belongs to the first latent of its step
            diff = torch.cat((diff[..., :1] + (go_on[:, :N] * used)[..., None], diff[..., 1:]), dim=-1)
        diffs.append(diff.flatten(1))
        masks.append(used.repeat_interleave(c, dim=1))
    if go_on is not None:
        diffs.append(go_on)
        masks.append(ends if new.latent is not None else ends | first(steps, N + 1))
    sides = {"token": (new.token - old.token, first(rollout.lengths, new.token.shape[1]), 1.0)}
    if diffs:
        sides["latent"] = torch.cat(diffs, dim=1), torch.cat(masks, dim=1), latent_coef
    loss, stats = 0.0, {}
    for name, (diff, mask, coef) in sides.items():
        ratio = diff.clamp(-3, 3).exp()
        gain = torch.minimum(ratio * advantage[:, None], ratio.clamp(1 - clip, 1 + clip) * advantage[:, None])
        loss = loss - coef * masked_mean(gain, mask).sum() / total
        stats |= {f"{name}_terms": mask.sum(), f"{name}_clipped": (((ratio - 1).abs() > clip) & mask).sum()}
    return loss, stats


# --- one step of the loop ---

def rl_step(run, ddp, reference, optimizer, examples, tokenizer, step):
    """Rollouts of a global batch of questions, their rewards, and the optimizer steps on them. Each process
    takes its questions. Returns statistics. Where every group has one reward there is nothing to learn and
    no step, not for the KL alone either: near the start its gradient is rounding, of which AdamW would make
    a full step."""
    cfg, model, Q, G = run.cfg, getattr(ddp, "module", ddp).model, len(examples), run.cfg.group
    mine = list(range(Q))[run.rank::run.world]
    d = model.policy.config.hidden_size
    noise = Noise.draw(Q * G, model.config, d, cfg.max_answer, generator(cfg.seed, RL_NOISE, step - 1))
    noise = noise[torch.tensor([q * G + g for q in mine for g in range(G)])]
    clock = [time.time()]
    model.eval()
    with run.autocast():
        questions = [examples[q].question for q in mine]
        rollout = model.rollout(questions, G, noise, cfg.max_answer, cfg.temperature, cfg.latent_temperature)
        clock.append(time.time())
        result = score(model, rollout, [examples[q].example for q in mine], tokenizer, cfg.w_acc, cfg.w_fmt,
                       cfg.w_coh)
    clock.append(time.time())
    advantage = advantages(result["reward"], G, cfg.std_norm)
    result |= {"latents": rollout.steps.float() * cfg.thoughts_per_step, "advantage": advantage.abs()}
    if rollout.sigma is not None:
        result["sigma"] = rollout.sigma
    share = len(mine) * run.world / Q  # processes may have unlike shares of the questions
    stats = run.mean({k: v.mean() * share for k, v in result.items()})
    stats["coherence"] /= max(stats.pop("decoded"), 1 / (Q * G))  # of the plans that were decoded
    if stats["advantage"] > 0:
        model.train()
        ids = [e.example.id for e in examples]
        stats |= update(run, ddp, reference, optimizer, rollout, advantage, step, ids)
    clock.append(time.time())
    return stats | dict(zip(("rollout_s", "score_s", "update_s"), np.round(np.diff(clock), 4).tolist()))


def update(run, ddp, reference, optimizer, rollout, advantage, step, ids):
    """Optimizer steps over one batch of rollouts, of advantages (B,) on the CPU. Each step takes as many
    rollouts of every question, so that what is in it does not depend on the number of processes. A
    micro-batch is some questions with theirs. Returns statistics."""
    cfg, G, log_probs = run.cfg, rollout.group, getattr(ddp, "module", ddp)
    members = cfg.minibatch // cfg.questions_per_step  # rollouts of each question in an optimizer step
    # a group of equal rewards only teaches how near to stay to the start; DDP needs one question at least
    learns = (advantage.view(-1, G) != 0).any(dim=1) | (reference is not None)
    active = learns.nonzero().flatten().tolist() or [0]
    most = max(cfg.micro_batch or cfg.minibatch, members)
    parts = [part.tolist() for part in np.array_split(active, -(-len(active) * members // most))]
    minibatches = [[(part, list(range(g, g + members))) for part in parts] for g in range(0, G, members)]
    # Old log-probabilities come from the update's own pass before the first step, as in the released code:
    # the rollout, one position at a time, rounds otherwise. The first minibatch finds them on its way.
    old = [[None] * len(parts)]
    with run.autocast():
        for minibatch in minibatches[1:]:
            old.append([log_probs(rollout.part(*who)).detached() for who in minibatch])
    sums, norms = {}, []
    for minibatch, olds in zip(minibatches, old):
        for i, (who, before) in enumerate(zip(minibatch, olds)):
            cut, a = rollout.part(*who), advantage.view(-1, G)[who[0]][:, who[1]].flatten().to(run.device)
            with run.no_sync(ddp, i + 1 < len(minibatch)):
                with run.autocast():
                    new = ddp(cut)
                    kl = None if reference is None else kl_to(reference, log_probs, new, cut)
                loss, stats = objective(new, before or new.detached(), cut, a, cfg.minibatch, cfg.ratio_clip,
                                        cfg.latent_coef, cfg.latent_mean)
                if kl is not None:
                    loss, stats["kl"] = loss + cfg.kl_coef * kl / cfg.minibatch, kl.detach()
                (loss * run.world).backward()  # DDP takes the mean; the losses are shares of a sum
            sums = {k: sums.get(k, 0) + v for k, v in stats.items()}
        norms.append(run.clip_gradients(optimizer, cfg.rl_clip, step, ids, {"objective": loss.detach()}))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    sums = run.mean(sums)
    out = {"grad_norm": float(np.mean(norms))}
    for side in ("latent", "token"):
        if f"{side}_terms" in sums:
            out[f"{side}_clip_frac"] = sums[f"{side}_clipped"] / max(1e-9, sums[f"{side}_terms"])
    if reference is not None:  # every rollout was in one of the minibatches
        out["kl"] = sums["kl"] * run.world / (cfg.minibatch * len(minibatches))
    return out


def kl_to(reference, log_probs, new, rollout):
    """Sum over rollouts of the KL to the policy that RL began with. Latents that are sampled count as
    actions: the KL is that of their distributions and of what follows, given the latents as they are, by
    path too."""
    fixed = log_probs.path and log_probs.model.config.vae
    now = log_probs(rollout, fixed=True) if fixed else new
    with torch.no_grad():
        before = reference(rollout)
    return divergence(now, before, rollout).sum()
