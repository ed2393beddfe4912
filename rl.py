"""Active planning: GRPO in latent space, rewarded by the right answer and by coherence.

Where this departs from the paper's released code:
1. coherence compares numbers as numbers, a step that does not parse is incoherent and an empty plan scores 0
   (there, an unparsable step matches everything and an empty plan scores 1: an invitation to hack the reward);
2. gradients are averaged over processes (there, the RL step bypasses DDP and the processes drift apart);
3. ratios are taken to the rollout's own log-probabilities, recorded while sampling: no second forward pass (but for
   "score" under bfloat16, see train.update);
4. gradients can flow through the chain of latents (LogProbs);
5. the policy can be held near the one that RL began with (divergence).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import extract_answer, is_correct, numbers_equal, parse_number, parse_step, well_formed
from model import KVCache, first
from vae import gaussian_kl, gaussian_logp, last, precise, stop_places, stop_terms, widened


# --- rewards ---

def coherence(steps, answer):
    """Share of coherent steps of one plan, 0 to 1 (paper, section 3.3). steps: decoded texts; answer: text or None.

    Step k is coherent when its result is an operand of some later step; the last one when its result is
    the predicted answer. A step that does not parse is incoherent; no step at all scores 0."""
    parsed = [parse_step(s) for s in steps]
    answer = None if answer is None else parse_number(answer)
    good = 0
    for k, step in enumerate(parsed):
        if step is None:
            continue
        if k + 1 == len(parsed):
            wanted = [] if answer is None else [answer]
        else:
            wanted = [x for later in parsed[k + 1:] if later is not None for x in later[0]]
        good += any(numbers_equal(step[1], x) for x in wanted)
    return good / len(steps) if steps else 0.0


@dataclass
class Score:
    """What became of each rollout: float tensors (B,)."""

    reward: torch.Tensor
    correct: torch.Tensor
    well_formed: torch.Tensor
    coherence: torch.Tensor  # 0 where the plan was not decoded
    decoded: torch.Tensor  # 1 where it was


def answer_texts(rollout, tokenizer, eos_id):
    """Text of each row's answer without <eos>, and whether <eos> ended it."""
    rows = [t[:n] for t, n in zip(rollout.tokens.tolist(), rollout.lengths.tolist())]
    ended = [bool(r) and r[-1] == eos_id for r in rows]
    return [tokenizer.decode(r[:-1] if e else r) for r, e in zip(rows, ended)], ended


def plan_texts(model, z, steps, tokenizer):
    """Per row of z (B, N, c, d) with `steps` (B,), what each latent step says in words."""
    return [[tokenizer.decode(s).strip() for s in row] for row in model.decode_steps(z, steps)]


def score(model, rollout, examples, tokenizer, w_acc=1.0, w_fmt=0.5, w_coh=0.1):
    """Reward of each rollout (paper, equation of section 3.3): examples[b // group] is row b's question.

    w_acc 0 is the coherence-only mode: the answer label is not used for the reward. Else only the plans of right
    answers are decoded: the coherence of others earns nothing."""
    texts, ended = answer_texts(rollout, tokenizer, model.config.eos_id)
    examples = [e for e in examples for _ in range(rollout.group)]
    correct = torch.tensor([float(is_correct(t, e)) for t, e in zip(texts, examples)])
    form = torch.tensor([float(e and well_formed(t)) for t, e in zip(texts, ended)])
    coherent, decoded = torch.zeros(len(texts)), torch.zeros(len(texts))
    if model.decoder is not None and (w_coh or not w_acc):
        decoded = correct if w_acc > 0 else torch.ones(len(texts))
        rows = decoded.nonzero().flatten()
        if len(rows):
            z, steps = (v[rows.to(v.device)] for v in (rollout.z, rollout.steps))
            plans = plan_texts(model, z, steps, tokenizer)
            answers = [extract_answer(texts[i]) for i in rows.tolist()]
            coherent[rows] = torch.tensor([coherence(p, a) for p, a in zip(plans, answers)])
    reward = w_acc * correct + w_fmt * form + w_coh * coherent
    return Score(reward, correct, form, coherent, decoded)


def advantages(reward, group, std=True, eps=1e-4):
    """(r - mean) / (std + eps) within each group of consecutive rows (B,); std=False leaves the division out."""
    r = reward.view(-1, group)
    a = r - r.mean(dim=1, keepdim=True)
    if std:
        a = a / (r.std(dim=1, keepdim=True, unbiased=False) + eps)
    # equal rewards teach nothing; their mean may still be off by rounding
    return a.masked_fill(r.amax(dim=1, keepdim=True) == r.amin(dim=1, keepdim=True), 0.0).flatten()


# --- objective ---

class Terms(NamedTuple):
    """What LogProbs gives: log-probabilities as a Rollout records them, and the distributions of its latents."""

    latent: torch.Tensor | None  # (B, N, c)
    stop: torch.Tensor | None    # (B, N + 1)
    token: torch.Tensor          # (B, A)
    mu: torch.Tensor | None = None      # (B, N, c, d), of fixed latents that were sampled
    logvar: torch.Tensor | None = None  # likewise


class LogProbs(nn.Module):
    """forward(Rollout): its log-probabilities under the current weights. A module of its own, so that DDP can wrap it.

    Two gradients of the expected reward (Config.latent_grad). "score", the paper's: latents are actions, held fixed,
    with their log-densities; one parallel pass over question + sampled latents + answer. "path", ours: latents are
    drawn again, one position at a time, from the noise of the rollout, and gradients flow through z = mu + sigma eps
    and the chain of latents into the log-probabilities of what was chosen, the stops and the answer's tokens. That is
    unbiased where the reward depends on these alone; of coherence, which depends on the latents too, it has only what
    it says of the choices. (score leaves out the density of the latent at which a row stopped.) tests/bench.py
    --signal measures both: the latents' term of score is nearly all noise."""

    def __init__(self, model, temperature=1.0, latent_grad="score", latent_temperature=1.0):
        super().__init__()
        self.model = model
        self.temperature, self.latent_temperature = temperature, latent_temperature
        self.path = latent_grad == "path"
        if not self.path and model.latent_head is not None and not model.config.vae:
            model.latent_head.requires_grad_(False)  # fixed latents without a density

    def forward(self, rollout, fixed=False):
        """Terms, with gradients; by path without latent, mu and logvar. fixed: of the latents as they are, by path too."""
        policy, config = self.model.policy, self.model.config
        B, N, c, _ = rollout.z.shape
        cache = KVCache()
        h0 = last(policy.hidden(rollout.prefix, cache=cache, valid=rollout.prefix_valid), rollout.prefix_valid)
        h0 = h0.repeat_interleave(rollout.group, dim=0)
        cache.expand(rollout.group)
        steps, device = rollout.steps, rollout.z.device
        used, written = first(steps, N), first(rollout.lengths, rollout.tokens.shape[1])
        embed = policy.embed_tokens
        latent = stop = mu = logvar = None
        if config.latent:
            ends = torch.full((B, 1), config.end_id, device=device)
            text = embed(torch.cat((ends, rollout.tokens[:, :-1]), dim=1))
            if self.path and not fixed:
                thought = self.model.think(h0, cache, steps, N, rollout.eps)
                h = policy.hidden(embeds=text, cache=cache, valid=written)
                if thought.stop_logits is not None:
                    stop = stop_terms(thought.stop_logits, steps, rollout.stopped)
            else:
                inputs = torch.cat((rollout.z.flatten(1, 2).to(text.dtype), text), dim=1)
                valid = torch.cat((used.repeat_interleave(c, dim=1), written), dim=1)
                h = policy.hidden(embeds=inputs, cache=cache, valid=valid)
                before, h = torch.cat((h0[:, None], h[:, :N * c]), dim=1)[:, :N * c], h[:, N * c:]
                latent, stop, mu, logvar = self.of_fixed(rollout, before, used)
        else:  # the first token is chosen at the end of the prefix
            h = h0[:, None]
            if rollout.tokens.shape[1] > 1:
                more = policy.hidden(rollout.tokens[:, :-1], cache=cache, valid=written[:, 1:])
                h = torch.cat((h, more), dim=1)
        logp = F.log_softmax(precise(policy.logits(h[written])) / self.temperature, dim=-1)
        token = torch.zeros(written.shape, device=device, dtype=logp.dtype)
        token = token.masked_scatter(written, logp.gather(1, rollout.tokens[written][:, None]).squeeze(1))
        return Terms(latent, stop, token, mu, logvar)

    def of_fixed(self, rollout, before, used):
        """Terms but for tokens of the latents as they were sampled; before (B, N c, d): the states before them."""
        latent = stop = mu = logvar = None
        B, N, c, _ = rollout.z.shape
        if rollout.latent_logp is not None:
            mu, logvar = self.model.latent(before.unflatten(1, (N, c)))
            wide = widened(logvar, self.latent_temperature)
            latent = gaussian_logp(rollout.z, mu, wide) * used[..., None]
        if rollout.stop_logp is not None:
            seen = torch.cat((rollout.z[:, :, 0], torch.zeros_like(rollout.stop_z)[:, None]), dim=1)  # (B, N + 1, d)
            here = stop_places(rollout.steps, rollout.stopped, N + 1)
            seen = torch.where(here[..., None], rollout.stop_z[:, None], seen)
            logits = precise(self.model.stop_head(seen.to(self.model.policy.embed_tokens.weight.dtype)))
            stop = stop_terms(logits, rollout.steps, rollout.stopped)
        return latent, stop, mu, logvar


def divergence(new, reference, rollout):
    """KL of the policy (Terms `new`) from a reference (Terms of the same Rollout), (B,): per rollout, the mean over its
    latents, in closed form, summed over d; plus the means over its stop decisions and its answer tokens, of the
    never-negative estimate q/p - log q/p - 1 (Schulman, http://joschu.net/blog/kl-approx.html; GRPO, arXiv 2402.03300,
    equation 4), whose gradient is that of the reverse KL. Latents count as actions, at temperature 1, given those before
    them; those that are not sampled have no KL."""
    steps, N = rollout.steps, rollout.z.shape[1]
    sides = []
    if new.mu is not None:
        used = first(steps, N)[..., None].expand(new.mu.shape[:3])
        mu, logvar = (new.mu - reference.mu) * torch.exp(-0.5 * reference.logvar), new.logvar - reference.logvar
        sides.append((gaussian_kl(mu, logvar) * mu.shape[-1], used))  # in the units of the reference, which is N(0, 1) there
    choices = [(new.token, reference.token, first(rollout.lengths, new.token.shape[1]))]
    if new.stop is not None:
        taken = first(steps, N + 1) | stop_places(steps, rollout.stopped, N + 1)
        choices.append((new.stop, reference.stop, taken))
    for p, q, mask in choices:
        log_ratio = q - p
        most = log_ratio.clamp(max=10)  # beyond, the exponential goes on as its tangent: the pull grows no more
        sides.append((most.exp() * (1 + (log_ratio - most)) - log_ratio - 1, mask))
    return sum((kl * mask).flatten(1).sum(dim=1) / mask.flatten(1).sum(dim=1).clamp(min=1) for kl, mask in sides)


def objective(new, rollout, advantage, total, clip=0.2, latent_coef=1.0, latent_mean=False):
    """PPO-clipped loss (paper, section 3.3), this part's share of the mean over `total` rollouts, and statistics.

    new: Terms; advantage (B,). It sums over each latent (its density, and at the first of a step
    log p(continue)) and the stop; each answer token. Log-ratios are clamped to +-3. Masked mean per rollout over
    the former and over answer tokens separately, the two added. latent_mean: the density averaged, not summed,
    over the d dimensions; latent_coef: weight of the latent terms (1 and False: the paper's)."""
    latent, stop, token = new[:3]
    steps, N, c = rollout.steps, rollout.z.shape[1], rollout.z.shape[2]
    used, written = first(steps, N), first(rollout.lengths, token.shape[1])
    sides = [(token - rollout.token_logp, written, 1.0)]
    diffs, masks = [], []
    if latent is not None:
        diff = latent - rollout.latent_logp
        diff = diff / rollout.z.shape[-1] if latent_mean else diff
        if stop is not None:  # log p(continue) belongs to the first latent of its step
            go_on = (stop - rollout.stop_logp)[:, :N] * used
            diff = torch.cat((diff[..., :1] + go_on[..., None], diff[..., 1:]), dim=-1)
        diffs.append(diff.flatten(1))
        masks.append(used.repeat_interleave(c, dim=1))
    if stop is not None:
        diffs.append(stop - rollout.stop_logp)
        ends = stop_places(steps, rollout.stopped, N + 1)
        masks.append(ends if latent is not None else ends | first(steps, N + 1))
    if diffs:
        sides.append((torch.cat(diffs, dim=1), torch.cat(masks, dim=1), latent_coef))
    loss, ratios = 0.0, []
    for diff, mask, coef in sides:
        ratio = diff.clamp(-3, 3).exp()
        a = advantage[:, None]
        gain = torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a) * mask
        loss = loss - coef * (gain.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum() / total
        ratios.append(ratio.detach()[mask])
    ratios = torch.cat(ratios)
    return loss, {"ratio_max": float(ratios.max()), "ratios": len(ratios), "clipped": int(((ratios - 1).abs() > clip).sum())}
