"""Rewards, advantages, objective and update against closed forms, autograd and naive rollouts."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import oracle
import pytest
import torch
import train
from data import Example
from model import LLaMA, LLaMAConfig, length_mask
from rl import (LogProbs, Terms, coherence, compute_rewards, divergence, group_advantages, objective,
                update)
from vae import METHODS, LatentConfig, LatentReasoner, Noise, Plan, Rollout, collate

S = "<<48/2=24>>"
PAPER = (0.2, 1.0, False)  # ratio_clip, latent_coef, latent_mean
PARTS = [("atp", {}), ("atp", {"stop": False}), ("atp", {"vae": False}), ("simcot", {}), ("nocot", {})]


# --- rewards ---

@pytest.mark.parametrize("steps, answer, want", [
    ([S, "<<48+24=72>>"], "72", 1.0),
    ([S, "<<48+24=72>>"], "24", 0.5),          # the last result is not the answer
    (["<<1+4=5>>", "<<15+2=17>>"], "17", 0.5),  # 5 is no operand of 15+2, though a substring
    (["<<10/4=2.5>>", "<<2.50*2=5>>"], "5.0", 1.0),  # numbers as numbers
    (["<<1,000+1=1001>>", "<<1001-1=1000>>"], "1,000", 1.0),
    (["nonsense", "<<48+24=72>>"], "72", 0.5),  # an unparsable step is incoherent
    ([S, "nonsense"], "72", 0.0),              # and is no consumer either
    ([S, "<<1+1=2>>", "<<24+2=26>>"], "26", 1.0),  # some later step, not just the next
    (["<<24+1=25>>", S], "24", 0.5),           # an earlier step is no later step
    ([S], "24", 1.0), ([S], None, 0.0), ([], "72", 0.0), ([], None, 0.0),
])
def test_coherence(steps, answer, want):
    assert coherence(steps, answer) == want


def test_advantages():
    r = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5])
    cfg = lambda group, std_norm=True: SimpleNamespace(group=group, std_norm=std_norm)
    a = group_advantages(r, cfg(4))
    assert torch.allclose(a, torch.tensor([1.0, -1, -1, 1, 0, 0, 0, 0]) * 0.75**0.5, atol=1e-3)
    assert group_advantages(r, cfg(4, False)).tolist() == [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]
    assert group_advantages(torch.full((7,), 1.6), cfg(7)).tolist() == [0.0] * 7  # though 7 x 1.6 / 7 is not 1.6 in fp32
    x = torch.randn(6, 8)
    want = (x - x.mean(1, True)) / (x.std(1, keepdim=True) + 1e-8)
    torch.testing.assert_close(group_advantages(x.flatten(), cfg(8)).view(6, 8), want)


class Words:
    """A tokenizer in which ids stand for fixed texts."""

    texts = {1: "### ", 2: "72", 3: "24", 4: "<<48/2=24>>", 5: "<<48+24=72>>", 6: "no"}

    def decode(self, ids):
        return "".join(self.texts[i] for i in ids)


def fake(tokens, plans):
    """A model and its rollouts of one question, whose answers and decoded plans are given."""
    model, n, width = oracle.tiny(), len(tokens), max(map(len, tokens))
    model.plan_texts = lambda z, steps, words: [[words.decode(step) for step in plans[i]] for i in z.tolist()]
    plan = Plan(torch.arange(n), None, None, torch.zeros(n), None, None)
    rows = torch.tensor([t + [0] * (width - len(t)) for t in tokens])
    return model, Rollout(None, n, plan, None, rows, torch.tensor([len(t) for t in tokens]))


def test_score():
    example, E = Example("q", (S, "<<48+24=72>>"), "72", "x:1"), oracle.EOS
    # right, wrong, right but malformed, right but never ended
    tokens = [[1, 2, E], [1, 3, E], [6, 1, 2, E], [1, 2]]
    model, rollout = fake(tokens, [[[4], [5]], [[4], [5]], [[4], [6]], []])
    got = compute_rewards(model, rollout, [example], Words(), train.Config(w_acc=1.0, w_fmt=0.5, w_coh=0.1))
    assert got["accuracy"].tolist() == [1, 0, 1, 1]
    assert got["well_formed"].tolist() == [1, 1, 0, 0]
    assert got["coherence"].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert got["decoded"].tolist() == [1, 0, 1, 1]  # the second plan, coherent by half, would earn nothing
    torch.testing.assert_close(got["reward"], torch.tensor([1.6, 0.5, 1.0, 1.0]))
    # coherence only: no label is used, so another label changes nothing
    alone = train.Config(w_acc=0.0, w_fmt=0.5, w_coh=1.0)
    got = compute_rewards(model, rollout, [example], Words(), alone)
    assert got["coherence"].tolist() == [1.0, 0.5, 0.0, 0.0] and got["decoded"].tolist() == [1, 1, 1, 1]
    other = compute_rewards(model, rollout, [replace(example, answer="5")], Words(), alone)
    assert got["reward"].tolist() == other["reward"].tolist() == [1.5, 1.0, 0.0, 0.0]


# --- log-probabilities ---

def make(method="atp", group=3, K=3, seed=3, questions=4, dtype=None, **parts):
    """A tiny model and rollouts of its own."""
    model = oracle.tiny(method, K=K, seed=seed, dtype=dtype or torch.float32, **parts)
    return model, model.rollout([e.question for e in oracle.examples(questions)], group,
                                draw(model, questions * group), 5)


def draw(model, rows):
    noise = Noise.draw(rows, model.config, 16, 5, torch.Generator().manual_seed(2))
    return Noise(*(v.to(model.policy.norm.weight.dtype) for v in noise))


def naive_terms(model, rollout, questions):
    """Terms.latent, stop and token by a naive rollout of each row, which must choose the same."""
    (B, N, c, _), A = rollout.plan.z.shape, rollout.tokens.shape[1]
    latent, stop, token = (torch.zeros(B, *shape, dtype=torch.double) for shape in ((N, c), (N + 1,), (A,)))
    noise = draw(model, B)
    for b in range(B):
        question = questions[b // rollout.group].question
        plan, tokens, *logps = oracle.rollout(model, question, noise, b, 5)
        assert len(plan) == rollout.plan.steps[b] and tokens == rollout.tokens[b, :rollout.lengths[b]].tolist()
        for out, logp in zip((latent[b], stop[b], token[b]), logps):
            if len(logp) and logp[0] != []:
                out[:len(logp)] = torch.tensor(logp, dtype=torch.double)
    return latent if model.config.vae else None, stop if model.config.stop else None, token


@pytest.mark.parametrize("method, parts", PARTS)
def test_log_probabilities_are_those_of_a_naive_rollout(method, parts):
    """One parallel pass over what was chosen, by score, or the chain of latents again, by path."""
    model, rollout = make(method, K=8, dtype=torch.double, **parts)
    model.requires_grad_(False)
    if method == "atp" and not parts:
        assert len(set(rollout.plan.steps.tolist())) > 2
        # the latent at which the longest plan was stopped is in no plan
        assert (rollout.plan.stopped & (rollout.plan.steps == rollout.plan.z.shape[1])).any()
    want = naive_terms(model, rollout, oracle.examples(4))
    score_terms = LogProbs(model, latent_grad="score")(rollout)
    by_path = LogProbs(model, latent_grad="path")
    for terms, latent in ((score_terms, want[0]), (by_path(rollout), None)):
        for got, expected in zip(terms, (latent, *want[1:])):
            assert (got is None) == (expected is None)
            if got is not None:
                torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)
        assert (terms.mu is None) == (terms.logvar is None) == (terms.latent is None)
    if score_terms.mu is not None:
        used = length_mask(rollout.plan.steps, rollout.plan.z.shape[1])
        z = score_terms.mu + torch.exp(0.5 * score_terms.logvar) * rollout.eps[:, :rollout.plan.z.shape[1]]
        torch.testing.assert_close(z[used], rollout.plan.z[used], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("grad", ("path", "score"))
def test_log_probabilities_on_parts_of_groups(grad):
    model, rollout = make(group=4)
    whole = LogProbs(model, latent_grad=grad)(rollout)
    for got, want in zip(LogProbs(model, latent_grad=grad)(rollout.select([3, 0, 2], [1, 3])), whole):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want[[13, 15, 1, 3, 9, 11]], atol=1e-4, rtol=1e-4)


def test_rows_beyond_the_tokenizer_have_no_probability():
    """Weights may have more rows than the tokenizer has ids. They change no rollout and no probability."""
    model, rollout = make("nocot")
    want = LogProbs(model, "score")(rollout).token
    model.policy.add_tokens(range(43, 60))
    model.policy.embed_tokens.weight.data[43:60] = 3 * model.policy.embed_tokens.weight.data[3]
    again = model.rollout([e.question for e in oracle.examples(4)], 3, draw(model, 12), 5)
    assert torch.equal(again.tokens, rollout.tokens)
    torch.testing.assert_close(LogProbs(model, "score")(rollout).token, want)
    model.config.vocab_size = 60  # with those rows in use both would be others
    assert not torch.allclose(LogProbs(model, "score")(rollout).token, want, atol=0.1)


@pytest.mark.parametrize("method, parts", [("atp", {}), ("atp", {"stop": False}), ("simcot", {})])
def test_path_gradient_equals_finite_differences(method, parts):
    """Naive rollouts of other weights with the same noise choose the same, with other probabilities: their
    differences are the gradient through the chain of latents."""
    model, rollout = make(method, group=2, questions=2, dtype=torch.double, **parts)
    questions, B = oracle.examples(2), 4
    a, b = torch.randn(B, 1, dtype=torch.double), torch.randn(B, 9, dtype=torch.double)

    def weigh(stop, token):
        return (token * a).sum() + (0 if stop is None else (stop * b[:, :stop.shape[1]]).sum())

    terms = LogProbs(model, latent_grad="path")(rollout)
    weigh(terms.stop, terms.token).backward()
    step, checked = 1e-6, 0
    for number, (name, p) in enumerate(model.named_parameters()):
        if name.startswith("policy.layers") and number % 5:
            continue
        if p.grad is None:
            assert name.startswith("decoder."), name
            continue
        i, values = int(p.grad.abs().argmax()), []
        for sign in (1, -1):
            with torch.no_grad():
                p.view(-1)[i] += sign * step
                values.append(weigh(*naive_terms(model, rollout, questions)[1:]))
                p.view(-1)[i] -= sign * step
        difference = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close(p.grad.view(-1)[i], difference, atol=1e-6, rtol=1e-4,
                                   msg=lambda m: f"{name}: {m}")
        checked += name.startswith("latent_head")
    assert checked >= 1 or method == "simcot"


@pytest.mark.parametrize("grad", ("path", "score"))
@pytest.mark.parametrize("method, parts", PARTS[:4])
def test_all_that_is_trained_gets_a_gradient(method, parts, grad):
    """DDP waits for the gradient of whatever requires one."""
    model, rollout = make(method, **parts)
    missing = lambda: [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.set_trainable()
    sum(model(collate(oracle.examples(4), model.config, 3, torch.randn(4, 3, 2, 16))).values()).backward()
    assert not missing()
    model.zero_grad()
    model.set_trainable(decoder=False)
    terms = LogProbs(model, latent_grad=grad)(rollout)
    objective(terms, terms.detached(), rollout, torch.randn(12), 12, *PAPER)[0].backward()
    assert not missing()


def test_both_gradients_are_of_the_expected_reward():
    """Either way, reward x gradient of the summed log-probabilities has the same mean over many rollouts."""
    rows = 8000
    # with a stop head, the paper's terms leave out the density of the latent at which the row stopped
    model = oracle.tiny(c=1, K=1, d=8, seed=8, scale=0.5, stop=False)
    noise = Noise.draw(rows, model.config, 8, 1, torch.Generator().manual_seed(4))
    rollout = model.rollout([[1, 2, 3]], rows, noise, 1)
    reward = (rollout.tokens[:, 0] % 2).float()
    reward -= reward.mean()
    gradients = {}
    for grad in ("path", "score"):
        log_probs, parts = LogProbs(model, latent_grad=grad), []
        for part in torch.arange(rows).split(rows // 20):
            terms = log_probs(rollout.select([0], part.tolist()))
            logp = sum(v.flatten(1).sum(dim=1) for v in terms[:3] if v is not None)
            weight = model.latent_head.mu.weight
            parts.append(torch.autograd.grad((logp * reward[part]).mean(), weight)[0].flatten())
        gradients[grad] = torch.stack(parts)
    along = gradients["path"].mean(dim=0) / gradients["path"].mean(dim=0).norm()
    path, score = gradients["path"] @ along, gradients["score"] @ along
    error = ((path.var() + score.var()) / 20).sqrt()
    assert path.std() < score.std() / 2 and error < path.mean() / 5  # so that the next line can fail
    assert abs(path.mean() - score.mean()) < 3 * error


# --- objective ---

@pytest.mark.parametrize("latent_mean, coef", [(False, 1.0), (True, 0.5)])
@pytest.mark.parametrize("method, parts", PARTS)
def test_objective_equals_its_definition(method, parts, latent_mean, coef):
    """A loop over rows and terms. Log-ratios lie inside the clip, outside it, beyond the clamp. Latents and
    tokens are counted apart."""
    model, rollout = make(method, **parts)
    model.requires_grad_(False)
    torch.manual_seed(0)
    old = LogProbs(model, "score")(rollout)
    far = lambda v, scale: None if v is None else v + scale * torch.randn(v.shape)
    new = Terms(far(old.latent, 16 if latent_mean else 1), far(old.stop, 0.3), far(old.token, 3.0))
    advantage, total = torch.randn(12), 0.0
    ratios = {"latent": [], "token": []}

    def gain(side, diff, a):
        ratio = math.exp(max(-3.0, min(3.0, float(diff))))
        ratios[side].append(ratio)
        return min(ratio * a, max(0.8, min(1.2, ratio)) * a)

    for b, a in enumerate(advantage.tolist()):
        n, m, sides = int(rollout.plan.steps[b]), int(rollout.lengths[b]), {"latent": [], "token": []}
        diff = lambda name: getattr(new, name)[b] - getattr(old, name)[b]
        for k in range(n):
            for j in range(2 if new.latent is not None else 0):
                value = diff("latent")[k, j] / (16 if latent_mean else 1)
                value += diff("stop")[k] if new.stop is not None and j == 0 else 0
                sides["latent"].append(gain("latent", value, a))
            if new.latent is None and new.stop is not None:
                sides["latent"].append(gain("latent", diff("stop")[k], a))
        if new.stop is not None and rollout.plan.stopped[b]:
            sides["latent"].append(gain("latent", diff("stop")[n], a))
        sides["token"] = [gain("token", diff("token")[i], a) for i in range(m)]
        for name, weight in (("latent", coef), ("token", 1.0)):
            total -= weight * sum(sides[name]) / max(1, len(sides[name])) / 24
    loss, stats = objective(new, old, rollout, advantage, 24, 0.2, coef, latent_mean)
    assert math.isclose(float(loss), total, rel_tol=1e-5)
    for side, values in ratios.items():
        assert (f"{side}_terms" in stats) == bool(values)
        if values:
            clipped = sum(abs(ratio - 1) > 0.2 for ratio in values)
            assert 0 < clipped < len(values) == stats[f"{side}_terms"]
            assert stats[f"{side}_clipped"] == clipped


@pytest.mark.parametrize("grad", ("path", "score"))
def test_first_gradient_is_the_policy_gradient(grad):
    """At ratio 1 the objective's gradient is that of the mean of advantage x (mean log-density of latents and
    stop + mean log-probability of answer tokens), written here as a loop over rows."""
    model, rollout = make()
    advantage, log_probs = torch.randn(12), LogProbs(model, latent_grad=grad)
    new = log_probs(rollout)
    loss, stats = objective(new, new.detached(), rollout, advantage, 12, *PAPER)
    loss.backward()
    assert stats["latent_clipped"] == stats["token_clipped"] == 0
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    latent, stop, token, *_ = log_probs(rollout)
    total = 0
    for b in range(12):
        n, m = int(rollout.plan.steps[b]), int(rollout.lengths[b])
        if grad == "score":
            terms = [latent[b, k, j] + (stop[b, k] if j == 0 else 0) for k in range(n) for j in range(2)]
        else:
            terms = list(stop[b, :n])
        if rollout.plan.stopped[b]:
            terms.append(stop[b, n])
        total = total - advantage[b] * (sum(terms) / len(terms) + token[b, :m].mean()) / 12
    total.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad, atol=2e-3, rtol=2e-2, msg=lambda m: f"{name}: {m}")
    assert "stop_head.0.weight" in got and "latent_head.logvar.weight" in got
    assert not any(n.startswith("decoder") for n in got)


def test_clipping():
    """min(ratio A, clip(ratio) A) of a single answer token, and the clamp of the log-ratio."""
    _, rollout = make("nocot", group=2, questions=1)
    rollout = rollout._replace(tokens=rollout.tokens[:, :1], lengths=torch.ones(2, dtype=torch.long))
    old = Terms(None, None, torch.zeros(2, 1))
    for a, diff, want in [(1, 0.1, math.exp(0.1)), (1, 0.5, 1.2), (1, -0.5, math.exp(-0.5)),
                          (-1, 0.5, -math.exp(0.5)), (-1, -0.5, -0.8), (-1, 9.0, -math.exp(3))]:
        new = torch.full((2, 1), diff, requires_grad=True)
        loss, stats = objective(Terms(None, None, new), old, rollout, torch.full((2,), float(a)), 2, *PAPER)
        assert math.isclose(loss.item(), -want, rel_tol=1e-5)
        loss.backward()
        assert (float(new.grad.abs().sum()) == 0) == (want in (1.2, -0.8) or diff == 9.0)
        clipped = 2 * (abs(math.exp(min(diff, 3)) - 1) > 0.2)
        assert (stats["token_clipped"], stats["token_terms"]) == (clipped, 2) and "latent_terms" not in stats


def test_latent_mean_and_coef():
    model, rollout = make()
    model.requires_grad_(False)
    old, advantage = LogProbs(model, "score")(rollout), torch.ones(12)

    def f(latent, latent_coef=1.0, latent_mean=False):
        new = old._replace(latent=latent)
        return float(objective(new, old, rollout, advantage, 12, 0.2, latent_coef, latent_mean)[0])

    assert bool(((rollout.plan.steps > 0) | rollout.plan.stopped).all())  # every row has a latent side
    shifted, shares = old.latent + 0.16, rollout.plan.steps * 2 / (rollout.plan.steps * 2 + rollout.plan.stopped)
    want = lambda gain: -(2 + gain * shares).mean().item()
    assert math.isclose(f(shifted), want(math.exp(0.16) - 1), rel_tol=1e-4)
    assert math.isclose(f(shifted, latent_mean=True), want(math.exp(0.01) - 1), rel_tol=1e-4)
    for latent in (old.latent, None):
        assert math.isclose(f(latent, latent_coef=0.5), -1.5, rel_tol=1e-4)


# --- divergence ---

@pytest.mark.parametrize("method, parts", [*PARTS[:3], PARTS[4]])
def test_divergence_equals_its_definition(method, parts):
    """A loop over rows, with torch.distributions for the latents; none of a policy from itself."""
    model, rollout = make(method, **parts)
    model.requires_grad_(False)
    new = LogProbs(model, "score")(rollout)
    ref = LogProbs(oracle.tiny(method, seed=4, **parts).requires_grad_(False), "score")(rollout)
    estimate = lambda p, q: math.exp(q - p) - (q - p) - 1
    for row, got in enumerate(divergence(new, ref, rollout).tolist()):
        n, m, want = int(rollout.plan.steps[row]), int(rollout.lengths[row]), 0.0
        if new.mu is not None and n:
            p, q = (torch.distributions.Normal(t.mu[row, :n], (t.logvar[row, :n] / 2).exp())
                    for t in (new, ref))
            want += float(torch.distributions.kl_divergence(p, q).sum(-1).mean())
        for a, b, k in ((new.stop, ref.stop, n + int(rollout.plan.stopped[row])), (new.token, ref.token, m)):
            if a is not None and k:
                want += sum(map(estimate, a[row, :k].tolist(), b[row, :k].tolist())) / k
        assert math.isclose(got, want, rel_tol=1e-4)
    far = torch.full_like(new.token, -30.0).requires_grad_()  # no ratio overflows, and the pull is never lost
    pull = divergence(new._replace(token=far), new, rollout).sum()
    pull.backward()
    assert pull.isfinite() and bool((far.grad[length_mask(rollout.lengths, far.shape[1])] < -1).all())
    start = divergence(new, LogProbs(model, "score")(rollout), rollout)
    torch.testing.assert_close(start, torch.zeros(12), atol=1e-5, rtol=0)


def test_divergence_is_the_kl_on_average():
    """Of the first answer token, over 20,000 samples."""
    model, other = (oracle.tiny("nocot").requires_grad_(False) for _ in range(2))
    other.policy.embed_tokens.weight[:43] += 0.1 * torch.randn(43, 16)
    noise = Noise.draw(20000, model.config, 16, 1, torch.Generator().manual_seed(1))
    rollout = model.rollout([[1, 2, 3]], 20000, noise, 1)
    kl = divergence(LogProbs(model, "score")(rollout), LogProbs(other, "score")(rollout), rollout)
    p, q = (torch.distributions.Categorical(logits=m(torch.tensor([[1, 2, 3]]))[0, -1])
            for m in (model.policy, other.policy))
    want, error = float(torch.distributions.kl_divergence(p, q)), float(kl.std() / 20000**0.5)
    assert abs(float(kl.mean()) - want) < 4 * error and 10 * error < want


# --- update ---

class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradients of each step, and changes no weight."""

    def __init__(self, model):
        super().__init__(model.parameters(), lr=0.0)
        self.names, self.steps = {p: n for n, p in model.named_parameters()}, []

    def step(self):
        params = self.param_groups[0]["params"]
        self.steps.append({self.names[p]: p.grad.clone() for p in params if p.grad is not None})


def rl_run(**settings):
    return train.Run(train.Config(**{"questions_per_step": 4, "group": 4, "minibatch": 16, **settings}), "rl")


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("grad", ("path", "score"))
def test_update_leaves_out_groups_of_equal_rewards(grad):
    """They cost nothing, and the gradient is that of all rollouts."""
    model, rollout = make(group=4)
    advantage, seen = torch.randn(16), []
    advantage[4:8] = advantage[8:10] = 0  # the second question, and half of the third one's
    log_probs, recorder = LogProbs(model, latent_grad=grad), Recorder(model)
    hook = log_probs.register_forward_hook(lambda module, args, out: seen.append(len(args[0].plan.z)))
    update(rl_run(micro_batch=8, rl_grad_clip=0.0), log_probs, None, recorder, rollout, advantage)
    assert seen == [8, 4]
    hook.remove()
    new = log_probs(rollout)
    objective(new, new.detached(), rollout, advantage, 16, *PAPER)[0].backward()
    [got], want = recorder.steps, gradients(model)
    assert got.keys() == want.keys()
    for name, g in want.items():
        torch.testing.assert_close(got[name], g, atol=1e-3, rtol=1e-3, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("grad, parts", [("path", {}), ("path", {"vae": False}), ("score", {}),
                                         ("score", {"vae": False})])
@pytest.mark.parametrize("micro_batch", (4, 12, 16))
def test_update_adds_the_divergence_of_all_groups(grad, parts, micro_batch):
    """Of those too whose rewards are equal, over micro-batches. By score it has the distributions of sampled
    latents; by path, stops and tokens after latents of its own, which a change of the latent head moves."""
    model, rollout = make(group=4, **parts)
    advantage = torch.randn(16)
    advantage[4:8] = 0
    log_probs, recorder = LogProbs(model, latent_grad=grad), Recorder(model)
    reference = LogProbs(oracle.tiny(seed=4, **parts), latent_grad=grad).requires_grad_(False)
    run = rl_run(micro_batch=micro_batch, kl_coef=0.3, rl_grad_clip=0.0)
    stats = update(run, log_probs, reference, recorder, rollout, advantage)
    new = log_probs(rollout)
    kl = divergence(new, reference(rollout), rollout).mean()
    (objective(new, new.detached(), rollout, advantage, 16, *PAPER)[0] + 0.3 * kl).backward()
    assert math.isclose(stats["kl"], kl.item(), rel_tol=1e-4)
    [got], want = recorder.steps, gradients(model)
    if grad == "path":
        other = LogProbs(copy.deepcopy(model), latent_grad=grad)
        other.model.latent_head.mu.weight.data *= 2
        assert divergence(log_probs(rollout), other(rollout), rollout).max() > 1e-3
    assert got.keys() == want.keys()
    for name, g in want.items():
        scale = float(g.abs().max())
        torch.testing.assert_close(got[name], g, atol=1e-3 * scale, rtol=1e-3, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("grad", ("path", "score"))
def test_update_is_ppo_from_the_policy_before_the_first_step(grad):
    """Several minibatches, against a plain loop. The old log-probabilities are those of the weights before
    the first step, though the policy has moved by then. Weights and statistics agree."""
    model, rollout = make(group=4, dtype=torch.double)
    advantage, start = torch.randn(16), copy.deepcopy(model)
    plain, fresh = copy.deepcopy(model), copy.deepcopy(model)
    run = rl_run(minibatch=4, micro_batch=2, latent_grad=grad, rl_grad_clip=0.5)
    sgd = lambda module: torch.optim.SGD(module.parameters(), lr=0.1)
    stats = update(run, LogProbs(model, latent_grad=grad), None, sgd(model), rollout, advantage)
    counts = {}
    for policy, is_old in ((plain, True), (fresh, False)):
        optimizer = sgd(policy)
        for g in range(4):
            part, a = rollout.select([0, 1, 2, 3], [g]), advantage.view(4, 4)[:, g]
            new = LogProbs(policy, latent_grad=grad)(part)
            old = LogProbs(start, latent_grad=grad)(part) if is_old else new
            loss, seen = objective(new, old.detached(), part, a, 4, *PAPER)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            for name, v in seen.items() if is_old else ():
                counts[name] = counts.get(name, 0) + float(v)
    for side in ("latent", "token"):
        want = counts[f"{side}_clipped"] / counts[f"{side}_terms"]
        assert math.isclose(stats[f"{side}_clip_frac"], want, rel_tol=1e-9)
    assert stats["latent_clip_frac"] > 0 and stats["latent_clip_frac"] != stats["token_clip_frac"]
    assert (flat(model) - flat(plain)).abs().max() < 1e-9
    assert (flat(model) - flat(fresh)).abs().max() > 1e-4


@pytest.mark.parametrize("grad", ("path", "score"))
def test_update_under_autocast(grad):
    """The gradient of bfloat16 is that of float32 up to rounding. No ratio is off before a weight moves."""
    model = oracle.tiny(scale=0.15, K=4, seed=3)
    rollout = model.rollout([e.question for e in oracle.examples(4)], 4, draw(model, 16), 5)
    advantage, log_probs = torch.randn(16), LogProbs(model, latent_grad=grad)
    got = {}
    for dtype in ("float32", "bfloat16"):
        recorder, run = Recorder(model), rl_run(minibatch=8, micro_batch=4, dtype=dtype, rl_grad_clip=0.0)
        stats = update(run, log_probs, None, recorder, rollout, advantage)
        assert len(recorder.steps) == 2 and stats["latent_clip_frac"] == stats["token_clip_frac"] == 0
        got[dtype] = {n: sum(step[n] for step in recorder.steps) for n in recorder.steps[0]}
    model.zero_grad()
    new = log_probs(rollout)
    objective(new, new.detached(), rollout, advantage, 8, *PAPER)[0].backward()  # two minibatches, each a mean over 8
    for name, g in gradients(model).items():
        for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 0.1)):
            error = float((got[dtype][name] - g).norm() / g.norm())
            assert error < tolerance, f"{dtype} {name}: {error}"


@pytest.fixture(scope="module")
def wide():
    """A LLaMA 512 wide whose latents have a sigma of about 0.1, and rollouts of it."""
    torch.manual_seed(0)
    policy = LLaMA(LLaMAConfig(128, 512, 512, 2, 8, 8, 64))
    config = LatentConfig(**{**METHODS["atp"], "decode": False}, method="atp", thoughts_per_step=2,
                          max_steps=3, start_id=40, end_id=41, eos_id=42, vocab_size=128)
    model = LatentReasoner(policy, config)
    torch.nn.init.constant_(model.latent_head.logvar.bias, 2 * math.log(0.1))
    noise = Noise.draw(16, config, 512, 5, torch.Generator().manual_seed(2))
    rollout = model.rollout([e.question for e in oracle.examples(4)], 4, noise, 5)
    sigma = torch.exp(0.5 * rollout.plan.logvar)
    assert 0.08 < float(sigma[rollout.plan.steps > 0].mean()) < 0.12
    return model, rollout


@pytest.mark.parametrize("lr", (0.0, 1e-9))
def test_a_step_of_next_to_nothing_leaves_ratios_near_one(wide, lr):
    """A density is a sum over d: rounding must not move it. In fp32 no ratio leaves 1 +- 0.01. In bfloat16,
    which RL with score uses only when told to, many leave the clip once any weight has moved."""
    advantage, stats = torch.randn(16, generator=torch.Generator().manual_seed(1)), {}
    for dtype in ("auto", "bfloat16"):
        model, rollout = copy.deepcopy(wide[0]), wide[1]
        run = rl_run(minibatch=4, micro_batch=8, latent_grad="score", dtype=dtype, device="cpu",
                     ratio_clip=0.01 if dtype == "auto" else 0.2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
        stats[dtype] = update(run, LogProbs(model, "score"), None, optimizer, rollout, advantage)
    assert stats["auto"]["latent_clip_frac"] == stats["auto"]["token_clip_frac"] == 0
    assert (stats["bfloat16"]["latent_clip_frac"] > 0.1) == (lr > 0)
