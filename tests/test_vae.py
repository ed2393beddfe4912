"""The latent reasoner against naive oracles (tests/naive.py), torch.distributions and finite differences."""

import json
import math
from dataclasses import replace

import naive
import pytest
import torch
from vae import LatentReasoner, LinearCrossEntropy, Noise, collate, gaussian_kl, gaussian_logp

METHODS = ("atp", "simcot", "coconut", "cot", "nocot")


def draw(model, rows, max_tokens=16, seed=1):
    return Noise.draw(rows, model.config, model.policy.config.hidden_size, max_tokens, torch.Generator().manual_seed(seed))


def compare(model, questions, group, noise, max_tokens=6, temperature=1.0, latent_temperature=1.0):
    """The batched rollout equals one naive rollout a row. Returns how many steps each row took."""
    with torch.no_grad():
        out = model.rollout(questions, group, noise, max_tokens, temperature, latent_temperature)
        for b in range(len(questions) * group):
            plan, tokens, latent_logp, stop_logp, token_logp = naive.rollout(
                model, questions[b // group], noise, b, max_tokens, temperature or 1e-6, latent_temperature)
            n = len(plan)
            assert int(out.steps[b]) == n
            if n:
                torch.testing.assert_close(out.z[b, :n], torch.stack(plan), atol=1e-4, rtol=1e-3)
            assert out.tokens[b, :out.lengths[b]].tolist() == tokens
            if noise is not None and temperature:
                torch.testing.assert_close(out.token_logp[b, :len(tokens)], torch.tensor(token_logp), atol=2e-4, rtol=1e-4)
            if out.latent_logp is not None and n:
                torch.testing.assert_close(out.latent_logp[b, :n], torch.tensor(latent_logp), atol=2e-3, rtol=1e-4)
            if out.stop_logp is not None:
                want = torch.tensor(stop_logp)
                torch.testing.assert_close(out.stop_logp[b, :len(want)], want, atol=2e-4, rtol=1e-4)
                assert out.stop_logp[b, len(want):].abs().sum() == 0
            assert bool(out.stopped[b]) == (model.config.stop and n < model.config.max_steps)
    return out.steps


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sampled", (False, True))
def test_rollout_equals_naive(method, sampled):
    questions = [e.question for e in naive.examples(5)]
    for seed in range(3):
        model = naive.tiny(method, seed=seed)
        compare(model, questions, 3 if sampled else 1, draw(model, 15) if sampled else None)


@pytest.mark.parametrize("temperature, latent_temperature", [(0.7, 1.0), (0.0, 1.0), (1.0, 1.7), (1.0, 0.0)])
def test_rollout_rows_stop_at_different_steps(temperature, latent_temperature):
    model = naive.tiny(K=4, seed=3)
    steps = compare(model, [e.question for e in naive.examples(8)], 4, draw(model, 32), 6, temperature,
                    latent_temperature)
    assert set(steps.tolist()) >= {0, 1, 2, 4}, "the case is only worth something when the rows differ"


def test_rollout_does_not_depend_on_the_batch():
    model = naive.tiny(seed=3)
    questions, noise = [e.question for e in naive.examples(6)], draw(model, 24)
    whole = model.rollout(questions, 4, noise)
    part = model.rollout(questions[2:4], 4, noise[torch.arange(8, 16)])
    rows = slice(8, 16)
    assert whole.steps[rows].equal(part.steps)
    assert [t[:n] for t, n in zip(whole.tokens[rows].tolist(), whole.lengths[rows].tolist())] == [
        t[:n] for t, n in zip(part.tokens.tolist(), part.lengths.tolist())]
    # and shape follows from rows(): whole groups, or equal parts of each
    cut = whole.rows(torch.arange(8, 16))
    assert cut.prefix.equal(whole.prefix[2:4]) and cut.group == 4
    cut = whole.rows(torch.tensor([0, 1, 4, 5, 8, 9]))
    assert cut.prefix.equal(whole.prefix[:3]) and cut.group == 2


def test_sampling_follows_the_distribution():
    """20,000 uniform draws give token frequencies equal to the softmax within five standard errors."""
    model, n = naive.tiny("nocot", scale=0.15), 20_000
    out = model.rollout([[1, 2, 3]], n, draw(model, n, 1), max_tokens=1)
    p = model.policy(torch.tensor([[1, 2, 3]]))[0, -1].softmax(0).detach()
    freq = torch.bincount(out.tokens[:, 0], minlength=len(p)) / n
    assert ((freq - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-4).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_losses_equal_naive(method, stage):
    model, rows = naive.tiny(method, dtype=torch.float64), naive.examples(6)
    noise = torch.randn(6, 3, 2, 16, dtype=torch.float64)
    got = model(collate(rows, model.config, stage, noise))
    want, tokens = {}, 0
    for e, eps in zip(rows, noise):
        losses, n = naive.sft_losses(model, e, stage, eps)
        tokens += n
        for k, v in losses.items():
            want[k] = want.get(k, 0) + (v if k == "answer" else v / len(rows))
    want["answer"] = want["answer"] / tokens
    assert got.keys() == want.keys()
    for k in want:
        torch.testing.assert_close(got[k].double(), want[k].double(), atol=1e-8, rtol=1e-7, msg=lambda m: f"{k}: {m}")


@pytest.mark.parametrize("method, stage", [("atp", 2), ("atp", 0), ("simcot", 2)])
def test_losses_under_autocast(method, stage):
    """Losses and gradients in bfloat16 are those of float32 up to rounding."""
    model, rows = naive.tiny(method, scale=0.15), naive.examples(6)
    batch, got = collate(rows, model.config, stage, torch.randn(6, 3, 2, 16)), []
    for dtype in (torch.float32, torch.bfloat16):
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            losses = model(batch)
        sum(losses.values()).backward()
        got.append((losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (want, gradients), (low, low_gradients) = got
    assert low_gradients.keys() == gradients.keys()
    for k, v in want.items():
        assert low[k].dtype == torch.float32 and abs(low[k] - v) < 0.02 * abs(v), k
    for name, g in gradients.items():
        assert low_gradients[name].dtype == torch.float32
        assert 0 < (low_gradients[name] - g).norm() < 0.1 * g.norm(), name


@pytest.mark.parametrize("parts", ({"vae": False}, {"stop": False}, {"decode": False}))
def test_ablations_equal_naive(parts):
    model, rows = naive.tiny(dtype=torch.float64, **parts), naive.examples(5)
    noise = torch.randn(5, 3, 2, 16, dtype=torch.float64)
    got = model(collate(rows, model.config, 3, noise))
    for k in ("stop", "kl", "decode"):
        want = [naive.sft_losses(model, e, 3, eps)[0].get(k) for e, eps in zip(rows, noise)]
        assert (k in got) == (want[0] is not None)
        if k in got:
            torch.testing.assert_close(got[k].double(), (sum(want) / 5).double(), atol=1e-8, rtol=1e-7)


def test_micro_batches_add_up():
    model, rows = naive.tiny(dtype=torch.float64), naive.examples(7)
    noise = torch.randn(7, 3, 2, 16, dtype=torch.float64)
    whole = model(collate(rows, model.config, 2, noise))
    tokens = round(1 / collate(rows, model.config, 2).token_weight)
    parts = [model(collate(rows[i:j], model.config, 2, noise[i:j], 7, tokens)) for i, j in ((0, 2), (2, 3), (3, 7))]
    for k in whole:
        torch.testing.assert_close(sum(p[k] for p in parts), whole[k])


@pytest.mark.parametrize("stage", (0, 3))
def test_leaving_padding_out_changes_nothing(stage, monkeypatch):
    """Losses and gradients with padding computed, left out, and left out with attention in parts."""
    rows, found = naive.examples(9), []
    noise = torch.randn(9, 3, 2, 16, dtype=torch.float64)
    for worth, part in ((10**9, 10**9), (1, 10**9), (1, 8)):
        monkeypatch.setattr("model.WORTH", worth)
        monkeypatch.setattr("model.PART", part)
        model = naive.tiny(dtype=torch.float64)
        losses = model(collate(rows, model.config, stage, noise))
        sum(losses.values()).backward()
        found.append([*losses.values(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-11, rtol=1e-9)


def test_linear_cross_entropy_equals_torch(monkeypatch):
    h, weight = torch.randn(7, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    targets, w = torch.randint(11, (7,)), torch.rand(7, dtype=torch.float64)
    results = []
    for logits in (None, 1, 33, 10**6):
        monkeypatch.setattr("vae.LOGITS", logits)
        a, b = h.clone().requires_grad_(), weight.clone().requires_grad_()
        if logits is None:
            loss = (torch.nn.functional.cross_entropy(a @ b.t(), targets, reduction="none") * w).sum()
        else:
            loss = LinearCrossEntropy.apply(a, b, targets, w)
        (3 * loss).backward()
        results.append((loss.detach(), a.grad, b.grad))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize("method", ("atp", "simcot"))
def test_gradient_through_the_chain_of_latents(method):
    """Finite differences of the whole loss, over every parameter, in fp64."""
    model, rows = naive.tiny(method, d=8, dtype=torch.float64), naive.examples(2, steps=(2, 3))
    noise = torch.randn(2, 3, 2, 8, dtype=torch.float64)
    batch = collate(rows, model.config, 3, noise)
    loss = lambda: sum(model(batch).values())
    loss().backward()
    g = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        direction = torch.randn(p.shape, generator=g, dtype=p.dtype)
        with torch.no_grad():
            p += 1e-6 * direction
            up = loss()
            p -= 2e-6 * direction
            down = loss()
            p += 1e-6 * direction
        assert math.isclose(float(up - down) / 2e-6, float((p.grad * direction).sum()), rel_tol=1e-5, abs_tol=1e-6), name


def test_gaussians_equal_torch_distributions():
    z, mu, logvar = torch.randn(3, 4, 5, 6, dtype=torch.float64).unbind(0)
    normal = torch.distributions.Normal(mu, (logvar / 2).exp())
    torch.testing.assert_close(gaussian_logp(z, mu, logvar), normal.log_prob(z).sum(-1))
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu)))
    torch.testing.assert_close(gaussian_kl(mu, logvar), kl.mean(-1))


def test_decode_steps_equals_one_at_a_time():
    model = naive.tiny()
    z, steps = torch.randn(4, 3, 2, 16), torch.tensor([3, 0, 1, 2])
    got = model.decode_steps(z, steps, max_tokens=5, rows=4)
    assert [len(r) for r in got] == steps.tolist()
    with torch.no_grad():
        for b, row in enumerate(got):
            for k, text in enumerate(row):
                inputs, want = list(z[b, k]), []
                for _ in range(5):
                    token = int(model.decoder.logits(naive.read(model.decoder, inputs)).argmax())
                    if token == naive.EOS:
                        break
                    want.append(token)
                    inputs += naive.embed(model.decoder, [token])
                assert text == want


def test_generation_ends_at_eos():
    model = naive.tiny("nocot")
    with torch.no_grad():
        model.policy.embed_tokens.weight[naive.EOS] = 3 * model.policy.hidden(torch.tensor([[1, 2]]))[0, -1]
    out = model.rollout([[1, 2]], max_tokens=16)
    assert out.tokens.tolist() == [[naive.EOS]] and out.lengths.tolist() == [1]


def test_decoder_reaches_policy_and_heads():
    """L_decode alone moves policy, latent head and decoder, not the stop head."""
    model = naive.tiny()
    model(collate(naive.examples(3), model.config, 3, torch.randn(3, 3, 2, 16)))["decode"].backward()
    moved = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == {"policy", "latent_head", "decoder"}


def test_checkpoint_round_trip(tmp_path):
    model = naive.tiny()
    model.decoder.load_state_dict({k: v + 1 for k, v in model.decoder.state_dict().items()})
    model.save_pretrained(tmp_path)
    again = LatentReasoner.from_pretrained(tmp_path)
    assert again.config == model.config
    ours = model.state_dict()
    assert ours.keys() == again.state_dict().keys()
    assert all(v.equal(ours[k]) for k, v in again.state_dict().items())


@pytest.mark.parametrize("change", (
    {"max_steps": None}, {"max_steps": 0}, {"max_steps": 10**9}, {"method": "magic"}, {"vae": 1}, {"start_id": 10**9},
    {"end_id": -1}, {"unknown": 1}, "a list", "missing"), ids=str)
def test_hostile_latent_json(tmp_path, change):
    naive.tiny().save_pretrained(tmp_path)
    file = tmp_path / "latent.json"
    raw = json.loads(file.read_text())
    raw.pop("stop") if change == "missing" else raw
    file.write_text(json.dumps([raw] if change == "a list" else raw if change == "missing" else raw | change))
    with pytest.raises(ValueError, match="latent.json: "):
        LatentReasoner.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64))
def test_loaded_in_another_dtype(tmp_path, dtype):
    naive.tiny().save_pretrained(tmp_path)
    model = LatentReasoner.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.rollout([[1, 2, 3]]).lengths[0] > 0


def test_batch_without_a_single_step():
    """Without a stop head an example needs no steps; there is nothing to decode then."""
    model = naive.tiny("simcot")
    rows = [replace(e, steps=[]) for e in naive.examples(2)]
    losses = model(collate(rows, model.config, 3))
    assert losses["decode"] == 0 and losses["answer"] > 0
