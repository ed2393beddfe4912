"""Losses, their gradients and the RL objective against plain loops (tests/oracle.py), in float64."""

from dataclasses import replace
from types import SimpleNamespace

import oracle
import pytest
import torch
from rl import LogProbs, group_advantages, objective
from transformers import LlamaConfig, LlamaForCausalLM
from vae import METHODS, Noise, collate

PARTS = "answer", "decode", "stop", "kl"
HAS = {"atp": PARTS, "simcot": PARTS[:2], "coconut": PARTS[:1], "cot": PARTS[:1], "nocot": PARTS[:1]}
assert HAS.keys() == METHODS.keys()  # a new method needs its line in the oracle
SHAPES = (2, 3, 0), (1, 2, 1), (2, 4, 2), (1, 3, 3)  # c, K, seed
REWARDS = [1.5, 0.0, 0.55, 1.6, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.1, 0.0]  # of three groups of four rollouts


@pytest.fixture(autouse=True)
def float64():
    """Shares and masks that the code makes by default are exact too."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def setting(method, shape=SHAPES[0], **parts):
    """A tiny model, one example each of 0 to K + 2 steps, and noise."""
    c, K, seed = shape
    model = oracle.tiny(method, c=c, K=K, seed=seed, dtype=torch.float64, **parts)
    rows = [oracle.examples(1, 10 * seed + n, steps=(n, n + 1))[0] for n in range(K + 3)]
    return model, rows, torch.randn(len(rows), K, c, 16, generator=torch.Generator().manual_seed(seed))


def trained(model):
    """Policy's embedding and the heads: gradients with respect to these are compared."""
    heads = [head for head in (model.latent_head, model.stop_head) if head is not None]
    return [model.policy.embed_tokens.weight] + [p for head in heads for p in head.parameters()]


def gradient(model, loss):
    grads = torch.autograd.grad(loss, trained(model), allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


def compare_gradients(model, got, want, tolerance=1e-9):
    """How far the gradient of a loss is off, in words. None where it is not."""
    got, want = gradient(model, got), gradient(model, want)
    error = float((got - want).norm() / want.norm())
    return None if error <= tolerance else f"gradient off by {error:.2g} of its norm"


def compare(model, examples, stage, noise, read=oracle.read, tolerance=1e-9):
    """Every part and the gradient of their sum must agree. Names what differs, with both values. Returns the
    oracle's parts."""
    want = oracle.batch_losses(model, examples, stage, noise, read)
    got, wrong = model(collate(examples, model.config, stage, noise)), []
    assert set(got) <= set(PARTS)
    for part in PARTS:  # a part that a method does not have may be left out or 0
        a, b = (float(torch.as_tensor(x.get(part, 0)).detach()) for x in (got, want))
        if not abs(a - b) <= tolerance * max(1, abs(b)):
            wrong.append(f"{part} {a:.6f}, oracle {b:.6f}" + (f" ({a / b:.4f} times)" if b else ""))
    wrong.append(compare_gradients(model, sum(got.values()), sum(want.values()), tolerance))
    assert not any(wrong), "; ".join(filter(None, wrong))
    return want


# --- supervised losses ---

@pytest.mark.parametrize("method", ("atp", "simcot", "coconut"))
@pytest.mark.parametrize("shape, stage", [(shape, s) for shape in SHAPES for s in range(1, shape[1] + 2)])
def test_losses_of_latent_stages(method, shape, stage):
    """Below K, at K and above it, with examples of fewer steps, as many and more."""
    model, rows, noise = setting(method, shape)
    want = compare(model, rows, stage, noise)
    assert set(want) == set(HAS[method]) and all(want.values())


@pytest.mark.parametrize("method, stage", [*((method, 0) for method in HAS), ("cot", 4), ("nocot", 4)])
def test_losses_of_text(method, stage):
    """At stage 0 every method but No-CoT is CoT. These two have no other stage."""
    model, rows, noise = setting(method)
    assert set(compare(model, rows, stage, noise)) == {"answer"}


@pytest.mark.parametrize("parts", ({"vae": False}, {"stop": False}, {"decode": False}), ids=str)
@pytest.mark.parametrize("stage", (2, 3, 4))
def test_losses_of_ablations(parts, stage):
    model, rows, noise = setting("atp", **parts)
    compare(model, rows, stage, noise)


@pytest.mark.parametrize("method", ("atp", "simcot", "coconut"))
@pytest.mark.parametrize("most", (0, 1))
@pytest.mark.parametrize("stage", (1, 3, 4))
def test_losses_of_short_plans(method, most, stage):
    """A batch in which no example has more than so many steps. Without any, ATP must stop at once."""
    model, rows, noise = setting(method)
    compare(model, [replace(row, steps=row.steps[:most]) for row in rows[:3]], stage, noise[:3])


@pytest.mark.parametrize("method", ("atp", "simcot"))
@pytest.mark.parametrize("stage", (1, 3, 4))
def test_losses_with_another_llama(method, stage, tmp_path):
    """Here transformers' LLaMA reads for the oracle. Its RMSNorm rounds to float32."""
    model, rows, noise = setting(method)
    theirs = {}
    for llama in (model.policy, model.decoder):
        folder = tmp_path / str(len(theirs))
        llama.save_pretrained(folder)
        config = LlamaConfig.from_pretrained(folder)
        theirs[llama] = LlamaForCausalLM.from_pretrained(folder, config=config, dtype=torch.float64).model

    def read(llama, embeds):
        out = theirs[llama](inputs_embeds=torch.stack(embeds)[None], use_cache=False)
        return out.last_hidden_state[0, -1]

    compare(model, rows, stage, noise, read, tolerance=1e-4)


# --- RL ---

@pytest.mark.parametrize("rewards", (REWARDS, [0.1 * i for i in range(12)], [1e-9, 0.0, 0.0, 0.0]))
def test_advantages(rewards):
    cfg = SimpleNamespace(group=4, std_norm=True)
    got, want = group_advantages(torch.tensor(rewards), cfg), torch.tensor(oracle.advantages(rewards, 4))
    error = float((got - want).abs().max() / want.abs().max())
    assert error < 1e-9, f"off by {error:.2g} of the largest"


def rollouts(model, examples, group):
    """The code's rollouts, and the oracle's of the same noise: question, plan, stopping latent, tokens."""
    rows, answer = group * len(examples), []
    noise = Noise.draw(rows, model.config, 16, 5, torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model.rollout([e.question for e in examples], group, noise, 5)
        for b in range(rows):
            question = examples[b // group].question
            plan, tokens, *_ = oracle.rollout(model, question, noise, b, 5)
            assert tokens == out.tokens[b, :out.lengths[b]].tolist()
            stopped = model.config.stop and len(plan) < model.config.max_steps
            stop_z = oracle.stopping_latent(model, question, plan, noise, b) if stopped else None
            answer.append((question, plan, stop_z, tokens))
    return out, answer


def take_a_step(model, scale):
    """Random changes of the policy and both heads."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith("decoder"):
                p.add_(torch.randn(p.shape, generator=g), alpha=scale)


@pytest.mark.parametrize("method, parts, shape", [
    *(("atp", {}, shape) for shape in SHAPES), ("atp", {"stop": False}, SHAPES[0]), ("simcot", {}, SHAPES[0]),
    ("coconut", {}, SHAPES[1]), ("cot", {}, SHAPES[0])], ids=str)
def test_objective(method, parts, shape):
    """Its value and gradient, when the weights have moved away from those that sampled."""
    model, rows, _ = setting(method, shape, **parts)
    if model.config.stop:
        with torch.no_grad():  # so that some rollouts stop, and some run into K
            model.stop_head[2].weight.mul_(0.2)
            model.stop_head[2].bias.copy_(torch.tensor([0.8, 0.0]))
    out, rows = rollouts(model, rows[:3], 4)
    log_probs = LogProbs(model, latent_grad="score")
    with torch.no_grad():
        old, before = log_probs(out), [oracle.choices(model, *row) for row in rows]
    take_a_step(model, 0.03)
    after, advantage = [oracle.choices(model, *row) for row in rows], oracle.advantages(REWARDS, 4)
    want = oracle.objective(after, before, REWARDS, 4)
    got = objective(log_probs(out), old, out, torch.tensor(advantage), len(rows), 0.2, 1.0, False)[0]
    assert abs((got - want).item()) < 1e-9, (got.item(), want.item())
    assert compare_gradients(model, got, want) is None
    if method == "atp" and not parts:  # choices inside the clip, outside it and beyond the clamp are there
        moved = [abs(a - b).item() for new, old in zip(after, before) for side in (0, 1)
                 for a, b in zip(new[side], old[side])]
        assert min(moved) < 0.18 and any(0.25 < x < 3 for x in moved) and max(moved) > 3
        assert {stop_z is None for _, _, stop_z, _ in rows} == {True, False}
