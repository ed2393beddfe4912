"""The latent reasoner against the oracle (tests/oracle.py), torch.distributions and finite differences."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import oracle
import pytest
import torch
import torch.nn.functional as F
import vae
from data import ASSETS, Tokenizer
from rl import LogProbs
from vae import LatentReasoner, Noise, collate, gaussian_kl, gaussian_logp, text_loss

METHODS = ("atp", "simcot", "coconut", "cot", "nocot")
near = torch.testing.assert_close
words = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))  # a tokenizer: text is the ids themselves


def draw(model, rows, max_tokens=16, seed=1):
    g = torch.Generator().manual_seed(seed)
    return Noise.draw(rows, model.config, model.policy.config.hidden_size, max_tokens, g)


@torch.no_grad()
def compare(model, questions, group, noise, max_tokens=6, temperature=1.0):
    """The batched rollout equals one naive rollout a row, and LogProbs gives each decision's log-probability.
    Returns the rollout."""
    out = model.rollout(questions, group, noise, max_tokens, temperature)
    terms = LogProbs(model, "score")(out)
    for b in range(len(questions) * group):
        plan, tokens, latent_logp, stop_logp, token_logp = oracle.rollout(
            model, questions[b // group], noise, b, max_tokens, temperature or 1e-6)
        n = len(plan)
        assert int(out.plan.steps[b]) == n
        assert bool(out.plan.stopped[b]) == (model.config.stop and n < model.config.max_steps)
        assert out.tokens[b, :out.lengths[b]].tolist() == tokens
        if n:
            near(out.plan.z[b, :n], torch.stack(plan), atol=1e-4, rtol=1e-3)
        if temperature == 1:
            near(terms.token[b, :len(tokens)], torch.tensor(token_logp), atol=2e-4, rtol=1e-4)
            assert terms.token[b, len(tokens):].eq(0).all()
        if model.config.vae and n:
            near(terms.latent[b, :n], torch.tensor(latent_logp), atol=2e-3, rtol=1e-4)
        if model.config.stop:
            near(terms.stop[b, :len(stop_logp)], torch.tensor(stop_logp), atol=2e-4, rtol=1e-4)
            assert terms.stop[b, len(stop_logp):].eq(0).all()
    return out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sampled", (False, True))
def test_rollout_equals_naive(method, sampled):
    questions = [e.question for e in oracle.examples(5)]
    for seed in range(3):
        model = oracle.tiny(method, seed=seed)
        compare(model, questions, 3 if sampled else 1, draw(model, 15) if sampled else None)


@pytest.mark.parametrize("temperature", (1.0, 0.7, 0.0))
def test_rollout_rows_stop_at_different_steps(temperature):
    model = oracle.tiny(K=4, seed=3)
    out = compare(model, [e.question for e in oracle.examples(8)], 4, draw(model, 32), 6, temperature)
    if temperature:  # 0: the stops are greedy too
        assert set(out.plan.steps.tolist()) >= {0, 1, 2, 4}, "the case is worth something only if rows differ"


@pytest.mark.parametrize("method", ("atp", "nocot"))
def test_every_end_of_the_list_ends_an_answer_and_no_id_beyond_the_tokenizer_is_drawn(method):
    """Of 60 rows of the embedding the tokenizer knows 43. The others may be as likely as they want."""
    model = oracle.tiny(method, seed=3, rows=60, ends=[5, 17, 30])
    questions = [e.question for e in oracle.examples(8)]
    out = compare(model, questions, 8, draw(model, 64), max_tokens=12)
    closing = {row[n - 1] for row, n in zip(out.tokens.tolist(), out.lengths.tolist()) if n < 12}
    assert closing == {5, 17, 30, oracle.EOS}
    with torch.no_grad():
        for llama in model.llamas():
            llama.embed_tokens.weight[43:] *= 10
        logits = model.policy(torch.tensor(questions[0])[None])[0, -1]
        assert logits.argmax() >= 43, "the case is only worth something when such a row is likeliest"
    for noise in (None, draw(model, 8)):
        assert compare(model, questions, 1, noise).tokens.max() < 43
    if model.decoder is not None:
        model.decoder.config.max_position_embeddings = 16 * 16
        plans = model.plan_texts(torch.randn(40, 1, 2, 16), torch.ones(40).long(), words)
        texts = [text.split() for text, in plans]
        assert {len(text) for text in texts} > {16}
        assert not {t for text in texts for t in map(int, text)} & {5, 17, 30, *range(42, 60)}


@torch.no_grad()
@pytest.mark.parametrize("latent_grad", ("score", "path"))
def test_rollout_that_stops_at_once(latent_grad):
    """Not one latent is used: there is still a stop and an answer to learn from."""
    model, questions = oracle.tiny(dtype=torch.float64), [e.question for e in oracle.examples(3)]
    model.stop_head[2].bias[1] += 1000
    out = model.rollout(questions, 2, draw(model, 6), 5)
    assert not out.plan.steps.any() and out.plan.stopped.all()
    terms = LogProbs(model, latent_grad=latent_grad)(out)
    for b in range(6):
        row = oracle.rollout(model, questions[b // 2], draw(model, 6), b, 5)
        near(terms.token[b, :out.lengths[b]], torch.tensor(row[4], dtype=torch.float64))
        near(terms.stop[b, :1], torch.tensor(row[3], dtype=torch.float64))


def test_rollout_does_not_depend_on_the_batch():
    model = oracle.tiny(seed=3)
    questions, noise = [e.question for e in oracle.examples(6)], draw(model, 24)
    whole = model.rollout(questions, 4, noise)
    part = model.rollout(questions[2:4], 4, Noise(*(t[8:16] for t in noise)))
    rows = slice(8, 16)
    assert whole.plan.steps[rows].equal(part.plan.steps)
    assert [t[:n] for t, n in zip(whole.tokens[rows].tolist(), whole.lengths[rows].tolist())] == [
        t[:n] for t, n in zip(part.tokens.tolist(), part.lengths.tolist())]
    # members of groups, of some questions
    cut, kept = whole.select([2, 0], [1, 3]), [9, 11, 1, 3]
    assert cut.group == 2 and cut.prefix.ids.equal(whole.prefix.ids[[2, 0]])
    for name in ("eps", "tokens", "lengths"):
        assert getattr(cut, name).equal(getattr(whole, name)[kept]), name
    for ours, theirs in zip(cut.plan, whole.plan):
        assert ours is theirs is None or ours.equal(theirs[kept])


def test_sampling_follows_the_distribution():
    """20,000 uniform draws give token frequencies equal to the softmax within five standard errors."""
    model, n = oracle.tiny("nocot", scale=0.15), 20_000
    out = model.rollout([[1, 2, 3]], n, draw(model, n, 1), max_tokens=1)
    p = model.policy(torch.tensor([[1, 2, 3]]))[0, -1].softmax(0).detach()
    freq = torch.bincount(out.tokens[:, 0], minlength=len(p)) / n
    assert ((freq - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-4).all()


@pytest.mark.parametrize("method, stage", [("atp", 2), ("atp", 0), ("simcot", 2)])
def test_losses_under_autocast(method, stage):
    """Losses and gradients in bfloat16 are those of float32 up to rounding."""
    model, rows = oracle.tiny(method, scale=0.15), oracle.examples(6)
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


def test_micro_batches_add_up():
    model, rows = oracle.tiny(dtype=torch.float64), oracle.examples(7)
    noise = torch.randn(7, 3, 2, 16, dtype=torch.float64)
    whole = model(collate(rows, model.config, 2, noise))
    tokens, cuts = len(collate(rows, model.config, 2).targets), ((0, 2), (2, 3), (3, 7))
    parts = [model(collate(rows[i:j], model.config, 2, noise[i:j], 7, tokens)) for i, j in cuts]
    for k in whole:
        near(sum(p[k] for p in parts), whole[k])


@pytest.mark.parametrize("tied", (True, False))
def test_text_loss_in_parts_equals_cross_entropy(tied, monkeypatch):
    """Value and gradients are those of F.cross_entropy on all logits, of which few lie in memory at once."""
    net = oracle.tiny("nocot", dtype=torch.float64).policy
    if not tied:
        net.lm_head = torch.nn.Linear(16, 64, bias=False, dtype=torch.float64)
    table = (net.embed_tokens if tied else net.lm_head).weight
    h, targets = torch.randn(7, 16, dtype=torch.float64, requires_grad=True), torch.randint(43, (7,))
    plain, seen = F.cross_entropy, []
    seeing = lambda x, *args, **more: seen.append(len(x)) or plain(x, *args, **more)
    want = F.cross_entropy(h @ table[:43].t(), targets, reduction="sum")
    gradients = torch.autograd.grad(3 * want, (h, table))
    monkeypatch.setattr(F, "cross_entropy", seeing)
    for limit, rows in ((1, 1), (43 * 3, 3), (43 * 7, 7), (10**6, 7)):
        monkeypatch.setitem(vae.MAX_LOGITS, "cpu", limit)
        seen.clear()
        got = text_loss(net, h, targets)
        near(got, want)
        near(torch.autograd.grad(3 * got, (h, table)), gradients)
        assert max(seen) == rows and sum(seen) == (7 if rows == 7 else 14)  # in parts again by backward


def test_text_loss_in_parts_under_autocast(monkeypatch):
    """In bfloat16 the parts have the gradients that all rows at once have, added up in fp32."""
    net = oracle.tiny("nocot").policy
    h, targets = torch.randn(12, 16, requires_grad=True), torch.randint(43, (12,))
    found = []
    for limit in (10**6, 43):
        monkeypatch.setitem(vae.MAX_LOGITS, "cpu", limit)
        with torch.autocast("cpu", torch.bfloat16):
            loss = text_loss(net, h, targets)
        found.append(torch.autograd.grad(3 * loss, (h, net.embed_tokens.weight)))
    near(found[0], found[1], atol=2e-2, rtol=2e-2)
    assert found[1][1].dtype == torch.float32


@pytest.mark.parametrize("method", ("atp", "simcot"))
def test_gradient_through_the_chain_of_latents(method):
    """Finite differences of the whole loss, over every parameter, in fp64."""
    model, rows = oracle.tiny(method, d=8, dtype=torch.float64), oracle.examples(2, steps=(2, 3))
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
        slope = float((p.grad * direction).sum())
        assert math.isclose(float(up - down) / 2e-6, slope, rel_tol=1e-5, abs_tol=1e-6), name


def test_gaussians_equal_torch_distributions():
    z, mu, logvar = torch.randn(3, 4, 5, 6, dtype=torch.float64).unbind(0)
    normal = torch.distributions.Normal(mu, (logvar / 2).exp())
    near(gaussian_logp(z, mu, logvar), normal.log_prob(z).sum(-1))
    standard = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    kl = torch.distributions.kl_divergence(normal, standard)
    near(gaussian_kl(mu, logvar), kl.mean(-1))


@torch.no_grad()
def test_plan_texts_equals_one_at_a_time(monkeypatch):
    monkeypatch.setitem(vae.MAX_DECODED, "cpu", 4)  # of 6 steps
    model = oracle.tiny()
    z, steps = torch.randn(4, 3, 2, 16), torch.tensor([3, 0, 1, 2])
    model.decoder.config.max_position_embeddings = 5 * 16  # 5 tokens a step
    got = model.plan_texts(z, steps, words)
    assert [len(r) for r in got] == steps.tolist()
    for b, row in enumerate(got):
        for k, text in enumerate(row):
            inputs, want = list(z[b, k]), []
            for _ in range(5):
                token = int(model.decoder.logits(oracle.read(model.decoder, inputs)).argmax())
                if token == oracle.EOS:
                    break
                want.append(token)
                inputs += oracle.embed(model.decoder, [token])
            assert text == words.decode(want)


def test_generation_ends_at_eos():
    model = oracle.tiny("nocot")
    with torch.no_grad():
        model.policy.embed_tokens.weight[oracle.EOS] = 3 * oracle.read(model.policy, oracle.embed(model.policy, [1, 2]))
    out = model.rollout([[1, 2]], max_tokens=16)
    assert out.tokens.tolist() == [[oracle.EOS]] and out.lengths.tolist() == [1]


def test_decoder_reaches_policy_and_heads():
    """L_decode alone moves policy, latent head and decoder, not the stop head."""
    model = oracle.tiny()
    model(collate(oracle.examples(3), model.config, 3, torch.randn(3, 3, 2, 16)))["decode"].backward()
    reached = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"policy", "latent_head", "decoder"}


def test_checkpoint_round_trip(tmp_path):
    model = oracle.tiny()
    model.decoder.load_state_dict({k: v + 1 for k, v in model.decoder.state_dict().items()})
    model.decoder.add_tokens()  # the padding of its table is zero again
    model.save_pretrained(tmp_path)
    again = LatentReasoner.from_pretrained(tmp_path)
    assert again.config == model.config
    ours = model.state_dict()
    assert ours.keys() == again.state_dict().keys()
    assert all(v.equal(ours[k]) for k, v in again.state_dict().items())


@pytest.mark.parametrize("change", (
    {"max_steps": None}, {"max_steps": 0}, {"max_steps": 10**9}, {"method": "magic"}, {"vae": 1},
    {"start_id": 10**9}, {"end_id": -1}, {"start_id": 42, "vocab_size": 42}, {"vocab_size": 44},
    {"vocab_size": 0}, {"unknown": 1}, "a list", "missing"), ids=str)
def test_hostile_latent_json(tmp_path, change):
    oracle.tiny().save_pretrained(tmp_path)
    file = tmp_path / "latent.json"
    raw = json.loads(file.read_text())
    if change == "missing":
        del raw["stop"]
    elif change == "a list":
        raw = [raw]
    else:
        raw |= change
    file.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="latent.json: "):
        LatentReasoner.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64))
def test_loaded_in_another_dtype(tmp_path, dtype):
    oracle.tiny().save_pretrained(tmp_path)
    model = LatentReasoner.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.rollout([[1, 2, 3]]).lengths[0] > 0


def test_batch_without_a_single_step():
    """Without a stop head an example needs no steps: each of its latent steps decodes the answer."""
    model = oracle.tiny("simcot", dtype=torch.float64)
    rows = [replace(e, steps=[]) for e in oracle.examples(2)]
    losses, want = model(collate(rows, model.config, 3)), [oracle.sft_losses(model, e, 3)[0] for e in rows]
    near(losses["decode"], (want[0]["decode"] + want[1]["decode"]) / 2)


def test_new_tokens_take_free_rows_of_a_padded_vocabulary(tmp_path):
    """The table grows only where the rows that the tokenizer does not use are too few."""
    import train
    tokenizer = Tokenizer.from_pretrained(ASSETS)
    words = tokenizer.vocab_size
    for spare, rows in ((0, words + 2), (1, words + 2), (2, words + 2), (5, words + 5)):
        folder = tmp_path / str(spare)
        tokenizer.save_pretrained(folder)
        net = oracle.tiny("nocot", rows=words + spare).policy
        net.save_pretrained(folder)
        args = train.parse(["--stage", "vae", "--init", str(folder), "--out_dir", str(tmp_path)])
        run = SimpleNamespace(device=torch.device("cpu"), rl=False, say=print)
        model, grown = train.build(train.resolve(args), run)
        assert (model.config.start_id, model.config.end_id) == (words, words + 1)
        assert model.config.vocab_size == grown.vocab_size == words + 2
        table = model.policy.embed_tokens.weight
        assert model.policy.config.vocab_size == rows and len(table) == -(-rows // 64) * 64
        kept = [i for i in range(words + spare) if i not in (words, words + 1)]
        assert table[kept].equal(net.embed_tokens.weight[kept])
