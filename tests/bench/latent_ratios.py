"""What `python tests/bench/bench.py --ratios` prints: how far one optimizer step moves the density of a
latent, at the paper's settings (--latent_grad score).

Random fp32 weights of width d, 16 questions x 8 rollouts of 3 steps of 2 latents, random rewards; minibatches
of 16 rollouts, AdamW with lr 1e-6, gradient norm clipped at 1, ratios at 0.2, log-ratios clamped to +-3."""
import math

import torch

from model import LLaMA, LLaMAConfig
from rl import LogProbs, group_advantages, objective
from train import Config
from vae import METHODS, LatentConfig, LatentReasoner, Noise


def setup(d, sigma, layers):
    """A reasoner of random weights whose latents have about this sigma, and rollouts of it."""
    torch.manual_seed(0)
    policy = LLaMA(LLaMAConfig(1000, d, 2 * d, layers, d // 64, d // 64, 64))
    config = LatentConfig(**METHODS["atp"] | {"stop": False, "decode": False}, method="atp", max_steps=3,
                          thoughts_per_step=2, start_id=997, end_id=998, eos_id=999, vocab_size=1000)
    model = LatentReasoner(policy, config)
    torch.nn.init.constant_(model.latent_head.logvar.bias, 2 * math.log(sigma))
    noise = Noise.draw(128, config, d, 8, torch.Generator().manual_seed(0))
    return model, model.rollout(torch.randint(997, (16, 20)).tolist(), 8, noise, 8)


def measure(d, sigma, latent_mean=False, layers=4):
    """{figure: value for each minibatch} of latents. "its own, after" is a minibatch's |log-ratio| after its
    step, which PPO would see only in a second epoch over the same rollouts."""
    model, rollout = setup(d, sigma, layers)
    log_probs, params, scale = LogProbs(model, "score"), list(model.parameters()), d if latent_mean else 1
    advantages = group_advantages(torch.randint(2, (128,)).float(), Config(group=8, std_norm=True)).view(16, 8)
    optimizer = torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0)
    parts = [rollout.select(range(16), [g]) for g in range(8)]
    old, rows = [log_probs(part).detached() for part in parts], {}
    add = lambda name, value: rows.setdefault(name, []).append(float(value))
    for g, part in enumerate(parts):
        new = log_probs(part)
        loss, without = (objective(new, old[g], part, advantages[:, g], 16, 0.2, coef, latent_mean)[0]
                         for coef in (1, 0))
        of_latents = torch.autograd.grad(loss - without, params, retain_graph=True, allow_unused=True)
        diff = (new.latent - old[g].latent).detach() / scale
        add("|log-ratio|", diff.abs().mean())
        add("outside the clip", ((diff.clamp(-3, 3).exp() - 1).abs() > 0.2).float().mean())
        add("clamped at +-3", (diff.abs() > 3).float().mean())
        add("latent gradient", torch.stack([v.norm() for v in of_latents if v is not None]).norm())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        add("its own, after", (log_probs(part).latent - old[g].latent).abs().mean().detach() / scale)
    return rows


def report():
    torch.set_num_threads(1)
    for d, sigma, mean in ((d, s, m) for d in (256, 512, 1024) for s in (0.1, 1.0) for m in (False, True)):
        print(f"d {d}, sigma {sigma}, latent_mean {mean}")
        for name, values in measure(d, sigma, mean).items():
            print(f"  {name:<18}" + "".join(f"{v:>9.3g}" for v in values), flush=True)
