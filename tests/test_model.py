"""model.py against transformers' LLaMA, its own plain uncached pass, and finite differences."""

import copy
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch._inductor.utils import fresh_cache
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import model
from model import LLaMA, LLaMAConfig, Padded

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # at head_dim 20: frequencies kept, between and stretched
SIZES = dict(vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=6, max_position_embeddings=128, rms_norm_eps=1e-5)


def reference(tied=True, rope=None, **sizes):
    """A random transformers model, weights so large that attention is sharp and a wrong position shows."""
    rope = {"rope_type": "default", **(rope or {}), "rope_theta": 500.0}
    config = LlamaConfig(**{**SIZES, **sizes}, tie_word_embeddings=tied, rope_parameters=rope,
                         initializer_range=0.3, bos_token_id=1, eos_token_id=2)
    net = LlamaForCausalLM(config).eval()
    for name, p in net.named_parameters():
        if "norm" in name:  # ones would hide a norm left out of place
            p.data.uniform_(0.5, 1.5)
    return net


def small(tied=True, rope=None, dtype=torch.float32, **sizes):
    """A random model of ours with the same large weights."""
    net = LLaMA(LLaMAConfig(**{**SIZES, **sizes}, rope_theta=500.0, rope_scaling=rope,
                            tie_word_embeddings=tied))
    for p in net.parameters():
        p.data.normal_(1.0 if p.dim() == 1 else 0.0, 0.3)
    net.add_tokens()  # the padding of the tables is zero again
    return net.to(dtype)


def cached_logits(net, tokens, sizes):
    """Logits of tokens (B, T), read and then gone on with in parts of these sizes."""
    first, *rest = net.embed_tokens(tokens).split(sizes, dim=1)
    h, cache = net.read(first, tail=sum(sizes[1:]))
    return net.logits(torch.cat([h, *(net.step(part, cache) for part in rest)], dim=1))


def random_tokens(*shape, vocab=61):
    return torch.randint(vocab, shape)


def edit(file, change):
    """Rewrite a JSON file: `change` is a dict of keys to set, a value of ... deletes the key."""
    raw = json.loads(Path(file).read_text())
    for key, value in change.items():
        raw.pop(key, None) if value is ... else raw.update({key: value})
    Path(file).write_text(json.dumps(raw))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --- the same numbers as transformers ---

@pytest.mark.parametrize("sizes", [
    dict(num_key_value_heads=4), dict(), dict(tied=False),
    dict(num_key_value_heads=1, head_dim=20, rope=LLAMA3), dict(tied=False, head_dim=20, rope=LLAMA3),
    dict(num_attention_heads=3, num_key_value_heads=1, head_dim=8)],
    ids=["mha", "gqa", "untied", "mqa-llama3", "untied-llama3", "3heads"])
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling", "both"])
@torch.no_grad()
def test_reads_what_transformers_wrote(sizes, spelling, tmp_path):
    net = reference(**sizes)
    net.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    if spelling == "rope_scaling":  # as published checkpoints have it
        old = {"rope_parameters": ..., "rope_theta": 500.0, "rope_scaling": sizes.get("rope")}
        edit(tmp_path / "config.json", old)
    elif spelling == "both":  # they disagree: transformers goes by rope_scaling
        edit(tmp_path / "config.json", {"rope_parameters": {"rope_theta": 9.0}, "rope_scaling": written})
    assert LlamaConfig.from_pretrained(tmp_path).rope_parameters == written
    ours, tokens = LLaMA.from_pretrained(tmp_path), random_tokens(2, 120)  # past the original context of 64
    assert_close(ours.inv_freq, net.model.rotary_emb.inv_freq)
    assert_close(ours(tokens), net(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shard", ["1GB", "8KB"])
@torch.no_grad()
def test_dtypes_and_shards(dtype, shard, tmp_path):
    reference(tied=False, num_attention_heads=2).to(dtype).save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (shard == "8KB")
    net = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = random_tokens(2, 30)
    assert_close(LLaMA.from_pretrained(tmp_path)(tokens), net(tokens).logits, atol=1e-4, rtol=1e-4)
    for want in (torch.bfloat16, torch.float64):
        ours = LLaMA.from_pretrained(tmp_path, dtype=want)
        assert {p.dtype for p in ours.parameters()} == {want}
        assert_close(ours.embed_tokens.weight[:61], net.model.embed_tokens.weight.to(want))
        assert ours.inv_freq.dtype == torch.float32 and ours(tokens).dtype == want


def test_rope_table_is_never_rounded():
    net = small(rope=LLAMA3)
    before = net.inv_freq.clone()
    assert torch.equal(net.bfloat16().inv_freq, before)
    assert torch.equal(copy.deepcopy(net).half().inv_freq, before)
    assert not any("freq" in name for name in net.state_dict())


@pytest.mark.skipif("SMOLLM2_DIR" not in os.environ, reason="SMOLLM2_DIR names no SmolLM2-135M checkpoint")
@torch.no_grad()
def test_smollm2():
    path = os.environ["SMOLLM2_DIR"]
    net, ours = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32), LLaMA.from_pretrained(path)
    tokens = random_tokens(1, 24, vocab=49152)
    want = net(tokens).logits
    for got in (ours(tokens), cached_logits(ours, tokens, (16, 7, 1))):
        assert (got - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rope", [None, LLAMA3])
@torch.no_grad()
def test_transformers_reads_what_we_wrote(tied, rope, tmp_path):
    ours, tokens = small(tied, rope, head_dim=20), random_tokens(2, 120)
    ours.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)
    net, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_close(net(tokens).logits, ours(tokens), atol=1e-4, rtol=1e-4)
    again = LLaMA.from_pretrained(tmp_path)
    assert again.config == ours.config
    assert_close(again.state_dict(), ours.state_dict(), atol=0, rtol=0)
    net.save_pretrained(tmp_path / "theirs")
    assert_close(LLaMA.from_pretrained(tmp_path / "theirs")(tokens), ours(tokens), atol=0, rtol=0)


def test_save_keeps_dtype(tmp_path):
    small(dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}


def test_spare_tensors_of_old_checkpoints(tmp_path):
    """A tied checkpoint may hold the embedding again as the output matrix, but no other one; old ones hold
    rotary tables."""
    net = small()
    net.save_pretrained(tmp_path)
    file, twice = tmp_path / "model.safetensors", net.embed_tokens.weight[:61].detach().clone()
    spare = {"lm_head.weight": twice, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    save_file({**load_file(file), **spare}, file)
    assert_close(LLaMA.from_pretrained(tmp_path).state_dict(), net.state_dict())
    assert LLaMA.from_pretrained(tmp_path, dtype=torch.bfloat16).lm_head is None
    twice[60, 5] += 1
    for other in (twice, twice[:60], twice[0]):
        save_file({**load_file(file), "lm_head.weight": other}, file)
        refused(tmp_path, "lm_head")
    edit(tmp_path / "config.json", {"tie_word_embeddings": False})
    save_file({**load_file(file), "lm_head.weight": twice}, file)
    assert_close(LLaMA.from_pretrained(tmp_path).output_weight()[:61].detach(), twice)


def test_names_of_a_compiled_model(tmp_path):
    """torch.compile puts a prefix before every name of what it wraps, in one file or in shards."""
    net, tokens = small(tied=False), random_tokens(2, 9)
    net.save_pretrained(tmp_path)
    file, prefix = tmp_path / "model.safetensors", "_orig_mod."
    tensors = {prefix + name: t for name, t in load_file(file).items()}
    save_file(tensors, file)
    assert_close(LLaMA.from_pretrained(tmp_path)(tokens), net(tokens))
    file.unlink()
    shards = {name: "ab"[i % 2] + ".safetensors" for i, name in enumerate(tensors)}
    for shard in set(shards.values()):
        save_file({name: t for name, t in tensors.items() if shards[name] == shard}, tmp_path / shard)
    model.write_json(tmp_path / "model.safetensors.index.json", {"weight_map": shards})
    assert_close(LLaMA.from_pretrained(tmp_path)(tokens), net(tokens))
    # a whole file beside the shards is the one that is read
    other = small(tied=False)
    other.save_pretrained(tmp_path)
    assert_close(LLaMA.from_pretrained(tmp_path)(tokens), other(tokens))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("like", [None, 7])
@torch.no_grad()
def test_add_tokens(tied, like, tmp_path):
    net, tokens = small(tied), random_tokens(2, 9)
    tokens[tokens == 8] = 9
    before, old = net(tokens), copy.deepcopy(net)
    net.add_tokens([8, 61, 62, 63], like)  # 8: a row that the vocabulary has to spare
    after, others = net(tokens), [i for i in range(61) if i != 8]
    assert_close(after[..., others], before[..., others])
    new = before.mean(dim=-1) if like is None else before[..., like]  # a mean row's logit is the mean logit
    assert_close(after[..., [8, 61, 62, 63]], new[..., None].expand(-1, -1, 4), atol=1e-4, rtol=1e-4)
    row = old.embed_tokens.weight[:61].mean(dim=0) if like is None else old.embed_tokens.weight[like]
    assert_close(net.embed_tokens.weight[[8, 61, 62, 63]], row.expand(4, -1))
    net.save_pretrained(tmp_path)
    assert_close(LlamaForCausalLM.from_pretrained(tmp_path)(tokens).logits, after, atol=1e-4, rtol=1e-4)


# --- ways of calling it ---

def gradients(net, loss):
    """Gradients of every parameter; one that the loss does not reach counts as zero."""
    grads = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True, materialize_grads=True)
    return dict(zip(dict(net.named_parameters()), grads))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab", [1, 61, 64, 65])
def test_padded_output_table(tied, vocab, tmp_path):
    """Rows of zeros beyond the vocabulary: they change no logit, get no gradient, and no file has them."""
    net = small(tied, dtype=torch.float64, vocab_size=vocab)
    h, want = torch.randn(5, 24, dtype=torch.float64, requires_grad=True), random_tokens(5, vocab=vocab)
    table = (net.embed_tokens if tied else net.lm_head).weight
    assert len(table) == -(-vocab // 64) * 64 and not table[vocab:].any() and table[:vocab].any(dim=1).all()
    ours, plain = net.logits(h), h @ table[:vocab].t()
    assert ours.shape == (5, vocab)
    assert_close(ours, plain)
    losses = (F.cross_entropy(logits, want) + logits.square().sum() for logits in (ours, plain))
    assert_close(*(torch.autograd.grad(loss, (h, table)) for loss in losses))
    net.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    assert {len(v) for name, v in on_disk.items() if "embed_tokens" in name or "lm_head" in name} == {vocab}
    read = LLaMA.from_pretrained(tmp_path, torch.float64)
    assert read.output_weight().equal(table) and read.embed_tokens.weight.equal(net.embed_tokens.weight)


@pytest.mark.parametrize("cached, calls, again", [(False, 3, 6), (True, 9, 15)])
def test_activation_checkpointing(cached, calls, again):
    """Wide passes are computed again in backward, single positions are not."""
    net, tokens, seen = small(), random_tokens(2, 12), []
    block = net.run_block
    net.run_block = lambda *args: seen.append(1) or block(*args)

    def run():
        seen.clear()
        if cached:
            logits = cached_logits(net, tokens, (7, 1, 4))
        else:
            logits = net(tokens)
        loss = logits.logsumexp(dim=-1).square().mean()
        return loss, gradients(net, loss), len(seen)

    loss, grads, n = run()
    net.activation_checkpointing = True
    loss_again, grads_again, n_again = run()
    assert (n, n_again) == (calls, again)
    assert_close((loss_again, grads_again), (loss, grads))


# --- the cache: whatever the split, padding and grouping, the result is that of plain uncached passes ---

@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.data())
def test_cache_equals_uncached(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    torch.manual_seed(draw(0, 2**31))
    kv, repeat, questions, group = draw(1, 2), draw(1, 3), draw(1, 3), draw(1, 3)
    prefix_length, tail_length, spare = draw(1, 6), draw(1, 7), draw(0, 3)
    net = small(data.draw(st.booleans()), data.draw(st.sampled_from([None, LLAMA3])), torch.float64,
                hidden_size=12, num_hidden_layers=2, intermediate_size=10, num_attention_heads=kv * repeat,
                num_key_value_heads=kv)
    lengths = torch.randint(1, prefix_length + 1, (questions,))
    prefix, tail = random_tokens(questions, prefix_length), random_tokens(questions * group, tail_length)
    real = torch.arange(prefix_length) < lengths[:, None]
    valid = torch.rand(questions * group, tail_length) < data.draw(st.sampled_from([0.5, 0.8, 1.0]))

    cuts = sorted({0, tail_length, *(draw(1, tail_length) for _ in range(draw(0, 3)))})

    def cached():
        """Logits (R, vocab) of the prefixes' tokens and (B, T, vocab) of the tail, over a cache with `spare` columns that
        are never written."""
        padded, parts = Padded.masked(prefix, real), []
        if data.draw(st.booleans()) or not real.all():
            every = torch.arange(len(padded.index))
            h, cache = net.read(net.embed_tokens(prefix), padded, every, tail_length + spare, group)
        else:
            h, cache = net.read(net.embed_tokens(prefix), tail=tail_length + spare, group=group)
            h = h.flatten(0, 1)
        for start, stop in zip(cuts, cuts[1:]):
            mask = valid[:, start:stop]
            parts.append(net.step(net.embed_tokens(tail[:, start:stop]), cache, None if mask.all() else mask))
        assert torch.equal(cache.mask.sum(dim=1), lengths.repeat_interleave(group) + valid.sum(dim=1))
        return net.logits(h), net.logits(torch.cat(parts, dim=1))

    prefix_logits, tail_logits = cached()
    with torch.no_grad():  # columns are then written in place
        assert_close(cached(), (prefix_logits, tail_logits), atol=1e-9, rtol=1e-7)

    weight_prefix, weight_tail = torch.randn_like(prefix_logits), torch.randn_like(tail_logits)
    loss = (prefix_logits * weight_prefix).sum() + (tail_logits * weight_tail)[valid].sum()
    of_question = [*zip(prefix_logits.split(lengths.tolist()), weight_prefix.split(lengths.tolist()))]
    plain_loss = 0
    for b in range(questions * group):
        q, n = b // group, lengths[b // group]
        plain = net(torch.cat((prefix[q, :n], tail[b, valid[b]]))[None])[0]
        assert_close(of_question[q][0], plain[:n], atol=1e-9, rtol=1e-7)
        assert_close(tail_logits[b, valid[b]], plain[n:], atol=1e-9, rtol=1e-7)
        plain_loss = plain_loss + (plain[n:] * weight_tail[b, valid[b]]).sum()
        if b % group == 0:  # the prefix is one computation for its whole group
            plain_loss = plain_loss + (plain[:n] * of_question[q][1]).sum()
    assert_close(gradients(net, loss), gradients(net, plain_loss), atol=1e-8, rtol=1e-6)


def test_invalid_columns_leak_nothing():
    """Not even by gradient: what stands in padding or in an invalid column may be anything."""
    net = small()
    prefix, tail = torch.randn(2, 5, 24, requires_grad=True), torch.randn(4, 3, 24, requires_grad=True)
    real = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    valid = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 1], [0, 1, 1]]).bool()
    padded = Padded.masked(real.long(), real)
    h, cache = net.read(prefix, padded, torch.arange(len(padded.index)), 4, group=2)
    out = net.logits(h).sum()
    for t in range(3):
        mask = valid[:, t:t + 1]
        out = out + net.logits(net.step(tail[:, t:t + 1], cache, mask))[mask].square().sum()
    for x, mask in zip(torch.autograd.grad(out, (prefix, tail)), (real, valid)):
        assert x[~mask].eq(0).all() and x[mask].ne(0).any(dim=-1).all() and x.isfinite().all()


class Chain(torch.nn.Module):
    """Latent reasoning in small: hidden states fed back as embeddings, over a cache or over and over."""

    def __init__(self, net, cached):
        super().__init__()
        self.net, self.cached = net, cached

    def forward(self, embeds, steps=2):
        x, (h, cache) = embeds, self.net.read(embeds, tail=3)
        h = h[:, -1:]
        for _ in range(steps):
            x = torch.cat((x, h), dim=1)
            h = self.net.step(h, cache) if self.cached else self.net.read(x)[0][:, -1:]
        return self.net.logits(h)


def test_gradients_of_a_latent_chain():
    net = small(dtype=torch.float64, vocab_size=5, hidden_size=4, intermediate_size=3, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, head_dim=2)
    chain, plain, embeds = Chain(net, True), Chain(net, False), torch.randn(2, 2, 4, dtype=torch.float64)
    weight = torch.randn(2, 1, 5, dtype=torch.float64)
    assert_close(chain(embeds), plain(embeds), atol=1e-10, rtol=1e-9)
    assert_close(*(gradients(net, (c(embeds) * weight).sum()) for c in (chain, plain)))
    names, values = zip(*((n, p.detach().clone().requires_grad_()) for n, p in chain.named_parameters()))
    f = lambda x, *p: torch.func.functional_call(chain, dict(zip(names, p)), (x,))
    assert torch.autograd.gradcheck(f, (embeds.requires_grad_(), *values), fast_mode=True)


def test_bfloat16_cache():
    """Cached and plain passes differ by rounding: neither is further from float32 than bfloat16 warrants."""
    net, tokens = small(), random_tokens(2, 40)
    want, low = net(tokens), copy.deepcopy(net).bfloat16()
    got = cached_logits(low, tokens, (30, 1, 9))
    error, plain_error = (got - want).abs().mean(), (low(tokens) - want).abs().mean()
    assert error < 1.5 * plain_error and plain_error < 0.1 * want.abs().mean()


def test_autocast_cache():
    """Under autocast keys and values are held in bfloat16: no step copies the prefix to convert it."""
    net, tokens, kept = small(), random_tokens(2, 12), {}
    keep = lambda t: kept.__setitem__(t.untyped_storage().data_ptr(), t) or t
    with torch.autocast("cpu", torch.bfloat16):
        h, cache = net.read(net.embed_tokens(tokens[:, :9]), tail=4)
        steps = [h]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            steps += [net.step(net.embed_tokens(tokens[:, i:i + 1]), cache) for i in range(9, 12)]
    held = [t for layer in (*cache.prefix, *cache.tail) for t in layer]
    assert {t.dtype for t in held} == {torch.bfloat16}
    prefix = {t.untyped_storage().data_ptr(): t.numel() for layer in cache.prefix for t in layer}
    like = {place for place, t in kept.items() if t.numel() in prefix.values()}
    assert like == set(prefix)
    want, _ = net.read(net.embed_tokens(tokens))
    assert (torch.cat(steps, dim=1) - want).abs().mean() < 0.05 * want.abs().mean()


# --- what is refused, and how: an error of one line that names file and key, nothing read or built ---

UNCHECKED = "read before everything was checked"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "whole"
    torch.manual_seed(0)
    net = reference(tied=False)
    net.save_pretrained(path)
    net.save_pretrained(path.with_name("shards"), max_shard_size="8KB")
    return path.parent


@pytest.fixture
def whole(pristine, tmp_path, monkeypatch):
    monkeypatch.setattr(LLaMA, "to_empty", lambda *_, **__: pytest.fail(UNCHECKED))
    return Path(shutil.copytree(pristine / "whole", tmp_path / "whole"))


@pytest.fixture
def shards(pristine, tmp_path, monkeypatch):
    monkeypatch.setattr(LLaMA, "to_empty", lambda *_, **__: pytest.fail(UNCHECKED))
    return Path(shutil.copytree(pristine / "shards", tmp_path / "shards"))


def refused(path, *words, error=ValueError):
    with pytest.raises(error) as caught:
        LLaMA.from_pretrained(path)
    assert type(caught.value) is error
    message = str(caught.value)
    assert message.isprintable(), message  # so: one line
    assert str(path) in message
    for word in words:  # the directory's own name, made from the test's, has many of these words
        assert word in message.replace(str(path), ""), message


SIZE_KEYS = [k for k in SIZES if k != "rms_norm_eps"]
ROPE = {"rope_theta": 500.0, "rope_type": "default"}
OTHER_ROPE = ("yarn", "linear", "dynamic", "longrope")
BAD_SIZES = ("64", True, 24.0, -24, [24], 2**40, 10**9, 10**400)
BAD_NUMBERS = ("8", None, True, 0, -1.0, [1], math.nan, math.inf, 10**400)


@pytest.mark.parametrize("change, word", [
    ({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"),
    ({"hidden_act": "gelu"}, "hidden_act"), ({"hidden_act": None}, "hidden_act"),
    ({"model_type": "mistral"}, "mistral"), ({"model_type": None}, "model_type"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    *[({"rope_parameters": {**ROPE, "rope_type": kind, "factor": 2.0}}, kind) for kind in OTHER_ROPE],
    *[({"rope_parameters": ..., "rope_scaling": {"type": kind, "factor": 2.0}}, kind) for kind in OTHER_ROPE],
    *[({key: value}, "mapping") for key in ("rope_parameters", "rope_scaling") for value in ("llama3", [1])],
    ({"rope_parameters": {**ROPE, "rope_type": ["llama3"]}}, "rope_type"),
    ({"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    *[({"rope_parameters": {k: v for k, v in {**ROPE, **LLAMA3}.items() if k != key}}, key)
      for key in LLAMA3 if key != "rope_type"],
    *[({"rope_parameters": {**ROPE, **LLAMA3, "factor": value}}, "") for value in (None, [1], "x", 10**400)],
    *[({"rope_parameters": {"rope_theta": value}}, "rope_theta") for value in BAD_NUMBERS],
    *[({"rms_norm_eps": value}, "rms_norm_eps") for value in BAD_NUMBERS],
    *[({key: value}, key) for key in SIZE_KEYS for value in BAD_SIZES],
    *[({key: 0}, key) for key in SIZE_KEYS if key not in ("head_dim", "num_key_value_heads")],
    *[({key: None}, key) for key in SIZE_KEYS if key not in ("head_dim", "num_key_value_heads")],
    *[({key: ...}, key) for key in SIZE_KEYS[:3] + SIZE_KEYS[4:5]],
    *[({"tie_word_embeddings": value}, "tie_word_embeddings") for value in ("false", None, [])],
    *[({"eos_token_id": value}, "eos_token_id") for value in ([2, "3"], [None], [2, 10**20])],
    *[({"num_hidden_layers": value}, "num_hidden_layers") for value in (500, 2**24, ...)]], ids=str)
def test_refused_config(whole, change, word):
    edit(whole / "config.json", change)
    refused(whole, "config.json", word)


@pytest.mark.parametrize("change, word", [
    ({"vocab_size": 2**24}, "embed_tokens"), ({"hidden_size": 2**24}, "embed_tokens"),
    ({"intermediate_size": 2**24}, "mlp"), ({"intermediate_size": 41}, "mlp"),
    ({"num_hidden_layers": 4}, "model.layers.3."), ({"num_hidden_layers": 2}, "model.layers.2."),
    ({"num_hidden_layers": 99}, "model.layers."),
    ({"num_key_value_heads": None}, "k_proj"), ({"num_key_value_heads": 4}, "k_proj"),
    ({"num_key_value_heads": 3}, "config.json"), ({"head_dim": 5}, "config.json"),
    ({"head_dim": None, "num_attention_heads": 5}, "config.json"),
    ({"head_dim": 8}, "q_proj"), ({"head_dim": 2**24}, "q_proj"),
    ({"num_attention_heads": 2**24, "num_key_value_heads": 2**24}, "q_proj")], ids=str)
def test_refused_config_for_other_weights(whole, change, word):
    edit(whole / "config.json", change)
    refused(whole, word)


@pytest.mark.parametrize("content", [
    b"", b"{", b"[1]", b'"llama"', b"null", b"\xff\xfe", b"[" * 10**5,
    b'{"vocab_size": ' + b"1" * 5000 + b"}"], ids=lambda b: repr(b[:8]))
def test_refused_config_text(whole, content):
    (whole / "config.json").write_bytes(content)
    refused(whole, "config.json")


def test_refused_paths(whole):
    refused(whole / "config.json", error=NotADirectoryError)
    refused(whole / "nowhere", "config.json", error=FileNotFoundError)
    (whole / "model.safetensors").unlink()
    refused(whole, "model.safetensors", "No such file")


@pytest.mark.parametrize("name, tensor", [
    ("model.norm.weight", None), ("lm_head.weight", None), ("model.layers.1.mlp.up_proj.weight", None),
    ("model.layers.0.self_attn.q_proj.bias", torch.zeros(24)),
    ("model.layers.7.mlp.up_proj.weight", torch.zeros(40, 24)),
    ("a\nb", torch.zeros(1)), ("model.norm.weight", torch.ones(23)), ("model.norm.weight", torch.ones(24, 1)),
    ("model.norm.weight", torch.tensor(1.0)), ("model.norm.weight", torch.ones(24, dtype=torch.int64)),
    ("model.norm.weight", torch.ones(24).to(torch.float8_e4m3fn)),
    ("model.norm.weight", torch.ones(24).bool())])
def test_refused_tensor(whole, name, tensor):
    file = whole / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(name, None)
    save_file(tensors | ({} if tensor is None else {name: tensor}), file)
    refused(whole, repr(name)[1:-1])


@pytest.mark.parametrize("damage", [
    lambda b: b"", lambda b: b[:4], lambda b: b[:100], lambda b: b[:-1], lambda b: b + b"\0",
    lambda b: b"\xff" * len(b),
    lambda b: (2**62).to_bytes(8, "little") + b[8:], lambda b: b[:8] + b"\xff" * 40 + b[48:],
    lambda b: (2).to_bytes(8, "little") + b"[]", lambda b: b.replace(b'"F32"', b'"X32"', 1)])
def test_refused_safetensors(whole, damage):
    file = whole / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    refused(whole, "model.safetensors")


def test_refused_git_lfs_pointer(whole):
    (whole / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0a39\nsize 5\n")
    refused(whole, "model.safetensors", "git lfs pull")


def test_refused_whole_file_is_a_directory(whole):
    (whole / "model.safetensors").unlink()
    (whole / "model.safetensors").mkdir()
    refused(whole, "model.safetensors")


@pytest.mark.parametrize("shard", [
    "../x.safetensors", "sub/x.safetensors", "..", ".", "", "a\0b", "..\\x", "x" * 10**5, 3, None, ["x"],
    "ABSOLUTE"])
def test_refused_shard_name(shards, shard):
    table = shards / "model.safetensors.index.json"
    weight_map = json.loads(table.read_text())["weight_map"]
    outside = shards.parent / "x.safetensors"  # it exists and would do, were it not outside
    shutil.copy(shards / weight_map["model.norm.weight"], outside)
    shard = str(outside) if shard == "ABSOLUTE" else shard
    edit(table, {"weight_map": {**weight_map, "model.norm.weight": shard}})
    # a name's folder is left out: such a file is not here, though it is there
    refused(shards, "not a readable safetensors file" if isinstance(shard, str) else table.name)


@pytest.mark.parametrize("change", [{"weight_map": ...}, {"weight_map": []}, {"weight_map": None}])
def test_refused_weight_map(shards, change):
    table = shards / "model.safetensors.index.json"
    edit(table, change)
    refused(shards, table.name, "weight_map")
    for text in ("[]", "{", "3"):
        table.write_text(text)
        refused(shards, table.name)


def test_refused_shards(shards):
    table = shards / "model.safetensors.index.json"
    weight_map = json.loads(table.read_text())["weight_map"]
    shards_of = list(weight_map.values())
    name, shard = next((n, s) for n, s in weight_map.items() if shards_of.count(s) == 1)
    edit(table, {"weight_map": {k: v for k, v in weight_map.items() if k != name}})
    refused(shards, name)
    edit(table, {"weight_map": weight_map})
    (shards / shard).unlink()
    refused(shards, shard, "No such file")


MEMORY = """
import sys, torch
from model import LLaMA
status = lambda key: next(int(l.split()[1]) / 1024 for l in open("/proc/self/status") if l.startswith(key))
LLaMA.from_pretrained(sys.argv[2])  # what the first use of torch and safetensors costs is not counted
for dtype in (torch.bfloat16, torch.float32):
    before = status("VmRSS:")
    net = LLaMA.from_pretrained(sys.argv[1], dtype=dtype)
    size = sum(p.numel() * p.element_size() for p in net.parameters()) / 2**20
    print(size, status("VmHWM:") - before)
    del net
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_holds_no_second_copy(tmp_path):
    """But of one tensor: the peak in a fresh process (VmHWM: ru_maxrss would start from this process's own peak)."""
    # the largest tensor comes last, when all others are there
    config = LLaMAConfig(50000, 1024, 2048, 1, 16, 16, 64, tie_word_embeddings=False)
    with torch.device("meta"):
        net = LLaMA(config)
    values = {n: torch.ones(p.shape, dtype=torch.bfloat16) for n, p in net.disk_parts().items()}
    model.save_tensors(values, tmp_path / "model.safetensors")
    model.write_json(tmp_path / "config.json", {"model_type": "llama", **dataclasses.asdict(config)})
    small().save_pretrained(tmp_path / "small")
    done = subprocess.run([sys.executable, "-c", MEMORY, tmp_path, tmp_path / "small"], capture_output=True,
                          text=True, check=True, cwd=Path(model.__file__).parent)
    for line in done.stdout.splitlines():
        size, growth = map(float, line.split())
        assert size > 100 and growth < 1.15 * size + 40 + 50000 * 1024 * 2 / 2**20, done.stdout
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@torch._inductor.config.patch({"cpp.simdlen": 1})  # 1: compiles faster
def test_gradients_of_inductor_through_a_chain():
    """Those of two latents equal eager ones. With donated buffers backward of 2.13 writes over attention's probabilities
    before it has read a view of them; compile_blocks turns them off. A cache that was filled with them on does no harm."""
    plain = small(num_hidden_layers=1, hidden_size=16, intermediate_size=24, num_key_value_heads=2, head_dim=6)
    compiled, tokens = copy.deepcopy(plain), random_tokens(3, 5)

    def of(net):
        h, cache = net.read(net.embed_tokens(tokens), tail=4)
        h = h[:, -1:]
        for _ in range(2):
            h = net.step(h, cache)
        return gradients(net, h.pow(3).sum())

    with fresh_cache():
        torch._dynamo.reset()
        compiled.compile_blocks()
        with torch._functorch.config.patch(donated_buffer=True), torch.compiler.config.patch(cache_key_tag=""):
            wrong = of(compiled)
        torch._dynamo.reset()
        compiled.compile_blocks()
        assert_close(of(compiled), of(plain), atol=1e-3, rtol=1e-3)
    with pytest.raises(AssertionError):
        assert_close(wrong, of(plain), atol=1e-3, rtol=1e-3)


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_compiled_blocks():
    """A compiled block gives the eager logits and gradients at all shapes, and few graphs serve them all.

    Only capture, as inductor would take minutes. Two models share the graphs, as policy
    and decoder do. A run asks for a wide pass, single positions and a text over a tail, with gradients and
    without, with one row a question and with several."""
    torch._dynamo.reset()
    nets, graphs, counts = (small(), small(tied=False, num_hidden_layers=1)), [], []
    plains = copy.deepcopy(nets)
    keep = lambda graph, _: graphs.append(graph) or graph.forward
    for net in nets:
        net.compile_blocks(backend=keep)

    def run(net, tokens, lengths, group, size):
        """Logits of a question, of three latents and of a text behind it."""
        question = Padded.masked(tokens, model.length_mask(lengths, tokens.shape[1]))
        every = torch.arange(len(question.index))
        h, cache = net.read(net.embed_tokens(tokens), question, every, size, group)
        found, z = [h], h[lengths.cumsum(dim=0) - 1].repeat_interleave(group, dim=0)[:, None]
        for _ in range(3):
            z = net.step(z, cache)
            found.append(z[:, 0])
        text = tokens[:, :4].repeat_interleave(group, dim=0)
        valid = torch.arange(4) < (torch.arange(len(text)) % 4 + 1)[:, None]
        found.append(net.step(net.embed_tokens(text), cache, valid)[valid])
        return net.logits(torch.cat(found))

    # no size is the same as one of another kind, which would count as one
    for rows, length, group, size in ((5, 9, 1, 7), (3, 14, 5, 11), (10, 8, 3, 12), (9, 20, 1, 31)):
        args = random_tokens(rows, length), torch.randint(3, length, (rows,)), group, size
        for net, plain in zip(nets, plains):
            outs = [run(m, *args) for m in (net, plain)]
            assert_close(*outs)
            assert_close(*(gradients(m, out.square().mean()) for m, out in zip((net, plain), outs)))
            with torch.no_grad():
                assert_close(run(net, *args), outs[1])
        counts.append(len(graphs))
    assert 0 < counts[0] < counts[1] == counts[-1] <= 14, counts
