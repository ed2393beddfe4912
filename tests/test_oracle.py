"""Losses, their gradients and the RL objective against plain loops (tests/oracle.py), in float64."""

from dataclasses import replace

import oracle
import pytest
import torch
from rl import LogProbs, group_advantages, objective
from transformers import LlamaConfig, LlamaForCausalLM
from vae import Noise, collate

PARTS = "answer", "decode", "stop", "kl"
SHAPES = (2, 3, 0), (1, 2, 1), (2, 4, 2), (1, 3, 3)  # c, K, seed
CASES = [(method, shape, stage) for method in ("atp", "simcot", "coconut") for shape in SHAPES
         for stage in range(shape[1] + 2)]  # below K, at K and above


@pytest.fixture(autouse=True)
def float64():
    """Shares and masks that the code makes by default are exact too."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def setting(method, shape, **parts):
    """A tiny model, one example each of 0 to K + 2 steps, and noise."""
    c, K, seed = shape
    model = oracle.tiny(method, c=c, K=K, seed=seed, dtype=torch.float64, **parts)
    rows = [oracle.examples(1, 10 * seed + n, steps=(n, n + 1))[0] for n in range(K + 3)]
    g = torch.Generator().manual_seed(seed)
    return model, rows, torch.randn(len(rows), K, c, 16, generator=g)


def compare(got, want, tolerance=1e-9):
    """Every part must agree. What differs is named, with both values and their ratio."""
    assert set(got) <= set(PARTS) and set(want) <= set(PARTS)
    wrong = []
    for part in PARTS:  # a part that a method does not have may be left out or 0
        a, b = (float(x.get(part, 0)) for x in (got, want))
        if not abs(a - b) <= tolerance * max(1, abs(b)):
            wrong.append(f"{part}: {a:.6f} where the oracle has {b:.6f}" + (f", {a / b:.4f} times" if b else ""))
    assert not wrong, "; ".join(wrong)


@pytest.mark.parametrize("method, shape, stage", CASES)
def test_losses(method, shape, stage):
    model, rows, noise = setting(method, shape)
    with torch.no_grad():
        want = oracle.batch_losses(model, rows, stage, noise)
        got = model(collate(rows, model.config, stage, noise))
    compare(got, want)
    if stage:  # the oracle's own parts are all at work
        assert all(want[part] > 0 for part in {"atp": PARTS, "simcot": PARTS[:2], "coconut": PARTS[:1]}[method])


@pytest.mark.parametrize("method", ("cot", "nocot"))
@pytest.mark.parametrize("stage", (0, 2, 4))
def test_losses_of_text(method, stage):
    """These have an answer loss, the same at every stage."""
    model, rows, _ = setting(method, SHAPES[0])
    with torch.no_grad():
        want = oracle.batch_losses(model, rows, stage)
        compare(model(collate(rows, model.config, stage)), want)
    assert set(want) == {"answer"}


@pytest.mark.parametrize("parts", ({"vae": False}, {"stop": False}, {"decode": False}))
@pytest.mark.parametrize("stage", (2, 3, 4))
def test_losses_of_ablations(parts, stage):
    model, rows, noise = setting("atp", SHAPES[0], **parts)
    with torch.no_grad():
        compare(model(collate(rows, model.config, stage, noise)),
                oracle.batch_losses(model, rows, stage, noise))


@pytest.mark.parametrize("method", ("atp", "simcot", "coconut"))
@pytest.mark.parametrize("stage", (1, 3, 4))
def test_losses_of_questions_without_steps(method, stage):
    """A batch in which no example has a step: ATP must stop at once, the others' steps are all idle."""
    model, rows, noise = setting(method, SHAPES[0])
    rows = [replace(row, steps=[]) for row in rows[:3]]
    with torch.no_grad():
        compare(model(collate(rows, model.config, stage, noise[:3])),
                oracle.batch_losses(model, rows, stage, noise))


@pytest.mark.parametrize("method, shape, stage", CASES)
def test_gradient_of_the_total_loss(method, shape, stage):
    """With respect to the policy's embedding, through answers, latents, stops, KL and decoder."""
    model, rows, noise = setting(method, shape)
    total = lambda losses: sum(losses[part] * (0.3 if part == "kl" else 1) for part in PARTS if part in losses)
    table = model.policy.embed_tokens.weight
    want, = torch.autograd.grad(total(oracle.batch_losses(model, rows, stage, noise)), table)
    got, = torch.autograd.grad(total(model(collate(rows, model.config, stage, noise))), table)
    error = float((got - want).norm() / want.norm())
    assert error < 1e-9, f"the gradient is off by {error:.2g} of its norm"


@pytest.mark.parametrize("method", ("atp", "simcot"))
@pytest.mark.parametrize("stage", (1, 3, 4))
def test_losses_with_another_llama(method, stage, tmp_path):
    """Here transformers' LLaMA reads for the oracle. Its RMSNorm rounds to float32."""
    model, rows, noise = setting(method, SHAPES[0])
    theirs = {}
    for llama in (model.policy, model.decoder):
        folder = tmp_path / str(len(theirs))
        llama.save_pretrained(folder)
        config = LlamaConfig.from_pretrained(folder)
        theirs[llama] = LlamaForCausalLM.from_pretrained(folder, config=config, dtype=torch.float64).model

    def read(llama, embeds):
        return theirs[llama](inputs_embeds=torch.stack(embeds)[None], use_cache=False).last_hidden_state[0, -1]

    with torch.no_grad():
        compare(model(collate(rows, model.config, stage, noise)),
                oracle.batch_losses(model, rows, stage, noise, read), tolerance=1e-5)


# --- RL ---

REWARDS = [1.5, 0.0, 0.55, 1.6, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.1, 0.0]


@pytest.mark.parametrize("rewards", (REWARDS, [0.1 * i for i in range(12)], [1e-9, 0, 0, 0]))
def test_advantages(rewards):
    got = group_advantages(torch.tensor(rewards), 4, True)
    want = torch.tensor(oracle.advantages(rewards, 4))
    error = float((got - want).abs().max() / want.abs().max())
    assert error < 1e-9, f"advantages are off by {error:.2g} of the largest"


def rollouts(model, examples, group, seed):
    """The code's rollouts, and the same as the oracle has them: question, plan, stopping latent, tokens."""
    B, g = group * len(examples), torch.Generator().manual_seed(seed)
    noise = Noise.draw(B, model.config, 16, 5, g)
    with torch.no_grad():
        out, rows = model.rollout([e.question for e in examples], group, noise, 5), []
        for b in range(B):
            question = examples[b // group].question
            plan, tokens, *_ = oracle.rollout(model, question, noise, b, 5)
            stopped = model.config.stop and len(plan) < model.config.max_steps
            rows.append((question, plan, oracle.stopping_latent(model, question, plan, noise, b) if stopped
                         else None, tokens))
            assert tokens == out.tokens[b, :out.lengths[b]].tolist()
            if model.config.latent:
                assert len(plan) == out.plan.steps[b] and stopped == bool(out.plan.stopped[b])
    return out, rows


def perturb(model, scale, seed):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.policy.parameters():
            p.add_(torch.randn(p.shape, dtype=p.dtype, generator=g), alpha=scale)
        for head in (model.latent_head, model.stop_head):
            for p in head.parameters() if head is not None else ():
                p.add_(torch.randn(p.shape, dtype=p.dtype, generator=g), alpha=scale)


@pytest.mark.parametrize("method, parts", [("atp", {}), ("atp", {"stop": False}), ("simcot", {}),
                                           ("coconut", {}), ("cot", {})])
@pytest.mark.parametrize("c, K, seed", SHAPES)
def test_objective(method, parts, c, K, seed):
    """The loss and its gradient with respect to the policy's embedding, after a step away from the old weights."""
    model = oracle.tiny(method, c=c, K=K, seed=seed, scale=0.3, dtype=torch.float64, **parts)
    out, rows = rollouts(model, oracle.examples(3, seed), 4, seed)
    log_probs, table = LogProbs(model, latent_grad="score"), model.policy.embed_tokens.weight
    with torch.no_grad():
        old, before = log_probs(out).detached(), [oracle.choices(model, *row) for row in rows]
    perturb(model, 0.01, seed)
    after = [oracle.choices(model, *row) for row in rows]
    want = oracle.objective(after, before, REWARDS, 4)
    got = objective(log_probs(out), old, out, torch.tensor(oracle.advantages(REWARDS, 4)), len(rows), 0.2, 1.0, False)[0]
    assert abs(float(got) - float(want)) < 1e-9 * abs(float(want)), (float(got), float(want))
    got, want = (torch.autograd.grad(loss, table)[0] for loss in (got, want))
    error = float((got - want).norm() / want.norm())
    assert error < 1e-9, f"the gradient is off by {error:.2g} of its norm"
    if method == "atp" and not parts:  # what is tried: rows that stopped and that did not, ratios on each side
        logs = [float(a - b) for new, old in zip(after, before) for a, b in zip(new[0] + new[1], old[0] + old[1])]
        assert {row[2] is None for row in rows} == {True, False}
        assert any(abs(x) < 0.15 for x in logs) and any(0.25 < abs(x) < 3 for x in logs)
