"""What `python tests/bench/bench.py --signal` and `--diversity` print: studies of trained checkpoints."""

from statistics import mean
from types import SimpleNamespace

import torch

from data import TEST_SETS, Tokenizer, encode_all, is_correct, load
from eval import find_checkpoint, read_state
from rl import LogProbs, compute_rewards, group_advantages
from train import batch_indices
from vae import LatentReasoner, Noise, generator


def opened(path):
    """Checkpoint, the settings it was trained with, model and tokenizer."""
    ckpt = find_checkpoint(path)
    model = LatentReasoner.from_pretrained(ckpt).eval()
    return ckpt, read_state(ckpt)["config"], model, Tokenizer.from_pretrained(ckpt)


def gradient(f, params):
    """d f / d params as one vector."""
    parts = torch.autograd.grad(f, params, retain_graph=True, allow_unused=True)
    return torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for g, p in zip(parts, params)])


def add_gradients(total, model, rollout, advantage, params):
    """Add the policy gradients of a rollout to {(gradient, term): vector}."""
    n_latents = rollout.plan.steps * model.config.thoughts_per_step
    for grad in ("score", "path"):
        terms = LogProbs(model, latent_grad=grad)(rollout)
        sides = {"answer": (terms.token, rollout.lengths), "latent": (terms.latent, n_latents),
                 "stop": (terms.stop, rollout.plan.steps + rollout.plan.stopped)}
        for term, (logp, n) in sides.items():
            if logp is not None:
                each = logp.flatten(1).sum(dim=1) / n.clamp(min=1)
                total[grad, term] = total.get((grad, term), 0.0) + gradient((advantage * each).sum(), params)


def signal(path, questions=512, group=8):
    """Rows (gradient, term, norm, cosine) of two independent estimates of a checkpoint's policy gradient,
    each from questions x group rollouts of its training questions, rewarded as in training, advantages
    divided by the group's deviation. ValueError: its latents are not sampled, so score has no gradient of
    them."""
    _, cfg, model, tokenizer = opened(path)
    if not model.config.vae:
        raise ValueError(f"--signal {path}: its latents are not sampled, so score has no gradient of them")
    model.set_trainable(decoder=False)
    train, _ = encode_all(load(cfg["data"], "train", cfg["data_dir"]), tokenizer,
                          model.policy.config.max_position_embeddings)
    params = [p for p in model.parameters() if p.requires_grad]

    def estimate(seed):
        total = {}
        for i in range(0, questions, 64):
            part = [train[j] for j in batch_indices(seed, i // 64, len(train), 64)]
            d = model.policy.config.hidden_size
            noise = Noise.draw(64 * group, model.config, d, 16, generator(seed, i))
            rollout = model.rollout([e.question for e in part], group, noise)
            settings = SimpleNamespace(**{**cfg, "group": group, "std_norm": True})
            result = compute_rewards(model, rollout, [e.example for e in part], tokenizer, settings)
            advantages = group_advantages(result["reward"], settings)
            add_gradients(total, model, rollout, advantages / (questions * group), params)
        return total

    one, two = estimate(1), estimate(2)
    return [(*key, f"{one[key].norm():.3g}", f"{torch.cosine_similarity(one[key], two[key], dim=0):.3f}")
            for key in one]


def diversity(paths, samples=32, limit=100):
    """Rows (checkpoint, what is sampled, ...) of how unlike the samples of a question are: distinct plans in
    the decoder's words, distinct answers, pass@1 and pass@`samples` in per cent, over the first `limit`
    questions of each built-in test set. Stops are sampled where answers are."""
    questions, rows = [e for name in TEST_SETS for e in load(name, "test")[:limit]], []
    for path in paths:
        ckpt, _, model, tokenizer = opened(path)
        policy = model.policy.config
        encoded, _ = encode_all(questions, tokenizer, policy.max_position_embeddings)
        noise = Noise.draw(len(encoded) * samples, model.config, policy.hidden_size, 16, generator(0))
        ways = {"answers": (1, 0)}  # temperature of answers, factor of sigma
        if model.config.vae:
            ways |= {"latents": (0, 1), "both": (1, 1), "latents, 3 sigma": (0, 3), "both, 3 sigma": (1, 3)}
        for way, (temperature, factor) in ways.items():
            figures = []
            for i in range(0, len(encoded), 16):
                part = encoded[i:i + 16]
                cut = Noise(*(v[i * samples:(i + len(part)) * samples] for v in noise))
                cut = cut._replace(latent=factor * cut.latent)
                rollout = model.rollout([e.question for e in part], samples, cut, 16, temperature)
                figures += of_questions(model, tokenizer, rollout, part)
            plans, answers, once, ever = (mean(column) for column in zip(*figures))
            rows.append([ckpt.parent, way, f"{plans:.1f}", f"{answers:.1f}", f"{100 * once:.1f}",
                         f"{100 * ever:.1f}"])
    return rows


def of_questions(model, tokenizer, rollout, encoded):
    """Of each question: distinct plans, distinct answers, share of right samples, whether one is right."""
    texts, _ = model.texts(rollout.tokens, rollout.lengths, tokenizer)
    plans = [()] * len(texts)
    if model.decoder is not None:
        plans = model.plan_texts(rollout.plan.z, rollout.plan.steps, tokenizer)
    found = []
    for j, e in enumerate(encoded):
        own = slice(j * rollout.group, (j + 1) * rollout.group)
        right = sum(is_correct(text, e.example) for text in texts[own]) / rollout.group
        found.append((len(set(map(tuple, plans[own]))), len(set(texts[own])), right, right > 0))
    return found
