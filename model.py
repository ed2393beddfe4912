"""LLaMA in one file: RMSNorm, RoPE (plain and Llama-3 scaled), grouped-query attention, SwiGLU.

Reads and writes Hugging Face checkpoints (config.json + safetensors, whole or sharded). The one thing
that differs from other small LLaMAs is the cache. Latent reasoning first reads a question in one
parallel pass and then goes on one position at a time, with gradients, and in reinforcement learning
with several continuations of the same question. So keys and values are held in two segments:

    prefix   (Q, KV, S, D)      the question, right-padded, computed once, shared by a group of G rows
    tail     (Q, KV, G, N, D)   what came since, N columns; row b of the batch is (b // G, b % G)

A decoding step copies only the short tail, never the prefix, and its autograd graph keeps one prefix.
Columns of the tail may be invalid in some rows: they are attended to by nobody and use up no position.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from reprlib import repr as short

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint


def positive(value):
    """Whether a JSON value is a number above 0 that float32 can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e38


@dataclass
class LLaMAConfig:
    """Fields of a Hugging Face LlamaConfig that this architecture needs, under their names there."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # None, or {"rope_type": "llama3", "factor": ..., ...}
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "head_dim", "max_position_embeddings")
        for name in sizes:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= 2**24:
                raise ValueError(f"{name} must be an integer from 1 to {2**24}, not {short(value)}")
        if self.num_attention_heads * self.head_dim > 2**24:  # with this no tensor's size overflows 64 bits
            raise ValueError(f"num_attention_heads times head_dim is {self.num_attention_heads * self.head_dim}, "
                             f"more than {2**24}")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not positive(value):
                raise ValueError(f"{name} must be a positive number, not {short(value)}")
            setattr(self, name, float(value))  # JSON's integers may be larger than a tensor's
        if not isinstance(self.tie_word_embeddings, bool):
            raise ValueError(f"tie_word_embeddings must be true or false, not {short(self.tie_word_embeddings)}")
        if self.bos_token_id is not None and type(self.bos_token_id) is not int:
            raise ValueError(f"bos_token_id must be an integer, not {short(self.bos_token_id)}")
        eos = self.eos_token_id
        if eos is not None and any(type(i) is not int for i in (eos if isinstance(eos, list) else [eos])):
            raise ValueError(f"eos_token_id must be an integer or a list of them, not {short(eos)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embedding turns pairs of dimensions")
        if self.rope_scaling is not None:
            needed = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            for key in needed:
                value = self.rope_scaling.get(key)
                if not positive(value):
                    raise ValueError(f"rope_scaling needs a positive number {key!r}, not {short(value)}")
            if self.rope_scaling["low_freq_factor"] >= self.rope_scaling["high_freq_factor"]:
                raise ValueError("rope_scaling needs low_freq_factor < high_freq_factor")

    @classmethod
    def from_dict(cls, raw):
        """From the contents of a config.json. ValueError names what this architecture has not."""
        if not isinstance(raw, dict):
            raise ValueError("it is not a JSON object")
        refused = {"model_type": ("llama",), "hidden_act": ("silu",), "attention_bias": (False,),
                   "mlp_bias": (False,), "quantization_config": (None,)}
        for key, allowed in refused.items():
            if key == "model_type" and key not in raw:
                raise ValueError("key 'model_type' is missing (this code reads model_type 'llama')")
            if raw.get(key, allowed[0]) not in allowed:
                raise ValueError(f"{key} {short(raw[key])} is not supported (only {allowed[0]!r})")
        raw = dict(raw)
        # transformers 5 writes rope_parameters; published checkpoints have rope_theta + rope_scaling
        for key in ("rope_parameters", "rope_scaling"):
            if not isinstance(raw.get(key), (dict, type(None))):
                raise ValueError(f"{key} must be an object, not {short(raw[key])}")
        rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})  # transformers' order of preference
        raw["rope_theta"] = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise ValueError(f"rope_type {short(kind)} is not supported (only 'default' and 'llama3')")
        if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
            raise ValueError("partial_rotary_factor is not supported")
        raw["rope_scaling"] = {**rope, "rope_type": kind} if kind == "llama3" else None
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if key not in raw:
                raise ValueError(f"key {key!r} is missing")
        if raw.get("num_key_value_heads") is None:
            raw["num_key_value_heads"] = raw["num_attention_heads"]
        if raw.get("head_dim") is None:
            heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
            if not (isinstance(heads, int) and isinstance(hidden, int) and heads > 0) or hidden % heads:
                raise ValueError("hidden_size is not a multiple of num_attention_heads, and there is no head_dim")
            raw["head_dim"] = hidden // heads
        raw.setdefault("tie_word_embeddings", False)  # LlamaConfig's own default
        raw.setdefault("rms_norm_eps", 1e-6)
        return cls(**{f.name: raw[f.name] for f in fields(cls) if f.name in raw})

    def to_dict(self):
        """A config.json that transformers 4 and 5 both open."""
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                "attention_bias": False, "mlp_bias": False, **asdict(self)}


def rope_frequencies(config):
    """Rotation per position of each pair of dimensions, float32 (head_dim / 2,).

    Llama-3 scaling (as in Meta's llama-models): wavelengths longer than the original context
    / low_freq_factor are stretched by `factor`, those shorter than context / high_freq_factor are kept,
    those between are interpolated."""
    freq = config.rope_theta ** -(torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    s = config.rope_scaling
    if s is None:
        return freq
    # as floats, like rope_theta
    low, high, factor, context = (float(s[key]) for key in (
        "low_freq_factor", "high_freq_factor", "factor", "original_max_position_embeddings"))
    turns = context * freq / (2 * math.pi)  # rotations within the old context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * freq / factor + smooth * freq


def rotate(x, cos, sin):
    """Rotary embedding of x (..., D), the halves of D kept apart as Hugging Face stores them."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


# --- rows: all that works on single positions runs on the real ones only, without padding ---

def first(counts, width):
    """Bool mask (B, width) of the first counts (B,) places of each row."""
    return torch.arange(width, device=counts.device) < counts[:, None]


class Pack(torch.autograd.Function):
    """(B * T, ...) -> its rows `index`."""

    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        return grad.new_zeros(ctx.shape).index_copy_(0, ctx.saved_tensors[0], grad), None


class Unpack(torch.autograd.Function):
    """The reverse: (N, ...) -> (B * T, ...), zeros elsewhere. `size`: B * T."""

    @staticmethod
    def forward(ctx, x, index, size):
        ctx.save_for_backward(index)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, index, x)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


WORTH = 64   # fewer invalid positions than this cost less to compute than to leave out
PART = 512   # least size of the groups of like length into which causal attention, which needs padding, cuts the rows


class Rows:
    """Which positions of a (B, T) pass are real, and where they are when packed: shorter rows first."""

    def __init__(self, B, T, valid=None, parts=1, worth=None):
        """parts: at most so many groups of rows for causal attention."""
        self.B, self.T, self.index, self.parts = B, T, None, [(slice(None), self)]
        count = B * T if valid is None else int(valid.sum())
        self.full = count == B * T
        if count + (worth or WORTH) > B * T:
            return
        lengths, order = valid.sum(dim=1).sort()
        places = order[:, None] * T + torch.arange(T, device=valid.device)
        self.index = places[valid[order]]
        parts = min(parts, B, B * T // PART)
        if parts > 1:
            self.parts, start = [], 0
            for part in lengths.tensor_split(parts):
                size, T = int(part.sum()), max(1, int(part[-1]))
                self.parts.append((slice(start, start + size), Rows(len(part), T, first(part, T), worth=1)))
                start += size

    def pack(self, x):
        """(B, T, ...) -> (N, ...)"""
        x = x.flatten(0, 1)
        return x if self.index is None else Pack.apply(x, self.index)

    def unpack(self, x):
        """(N, ...) -> (B, T, ...), zeros elsewhere"""
        x = x if self.index is None else Unpack.apply(x, self.index, self.B * self.T)
        return x.unflatten(0, (self.B, self.T))


# --- weights of many short passes: their gradient is one matrix product at the end, not one a pass ---

class Hold(torch.autograd.Function):
    """A weight, and at the end of backward the gradient that all uses of it have left in `uses`. Autograd runs this
    node when every pass is done with it; a backward that asks for no gradient of the weight must be the graph's last."""

    @staticmethod
    def forward(ctx, weight, dtype, uses):
        ctx.uses, ctx.dtype = uses, weight.dtype
        ctx.set_materialize_grads(False)
        return weight.to(dtype) if dtype != weight.dtype else weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        if not ctx.uses:
            return None, None, None
        x, g = (torch.cat(part) for part in zip(*ctx.uses))
        ctx.uses.clear()
        return (g.t() @ x).to(ctx.dtype), None, None


class Use(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, uses):
        ctx.save_for_backward(x, weight)
        ctx.uses = uses
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        ctx.uses.append((x, grad))
        return grad @ weight if ctx.needs_input_grad[0] else None, None, None


class HeldLinear:
    """A bias-free nn.Linear as the passes over a tail use it: a pass of a few rows costs a read of the weights, and
    its own weight gradient would cost a write and an addition of as much again."""

    def __init__(self, linear):
        weight, self.uses = linear.weight, []
        autocast = torch.is_autocast_enabled(weight.device.type)
        self.dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        self.weight = Hold.apply(weight, self.dtype, self.uses)

    def __call__(self, x):
        return Use.apply(x.to(self.dtype), self.weight, self.uses)


class KVCache:
    """Keys and values of a shared prefix and of the tail since (see the top of this file)."""

    def __init__(self):
        self.group = 1
        self.prefix = None        # per layer: k, v (Q, KV, S, D)
        self.prefix_bias = None   # (Q, 1, 1, 1, 1, S) or None where no row is padded: 0, or -inf at padding
        self.tail = None          # per layer: k, v (Q, KV, G, N or more, D)
        self.valid = None         # (B, N) bool
        self.next_position = None  # (B,) position of each row's next token
        self.held = None          # {nn.Linear: HeldLinear} where gradients are wanted

    def expand(self, group):
        """From now on each row of the prefix is continued by `group` rows of the batch."""
        assert self.tail is None and self.group == 1
        self.group = group
        self.next_position = self.next_position.repeat_interleave(group)
        return self


def append(tail, new, N):
    """Columns `new` (Q, KV, G, T, D) after the first N of `tail` -> the tail to keep, and its N + T columns.

    Autograd needs every version of the tail; without it there is one buffer with room to grow."""
    if torch.is_grad_enabled():
        tail = torch.cat((tail, new), dim=3)
        return tail, tail
    end = N + new.shape[3]
    if end > tail.shape[3]:
        tail = F.pad(tail, (0, 0, 0, max(16, end)))
    tail[:, :, :, N:end] = new
    return tail, tail[:, :, :, :end]


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.sizes = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.sizes), bias=False)  # queries, keys, values
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x, rows, rope, past, bias, held):
        """x (N, d) -> y (N, d), (k, v). `past`: None for a causal pass over a prefix, which gives k, v (N, KV, D),
        else (prefix_k, prefix_v, tail_k, tail_v, columns of the tail in use), which gives the longer tail."""
        B, T, H, KV, D = rows.B, rows.T, self.heads, self.kv_heads, self.head_dim
        qk, v = apply(self.qkv_proj, x, held).unflatten(1, (H + 2 * KV, D)).split((H + KV, KV), dim=1)
        qk = rotate(qk, *rope).to(v.dtype)  # else autocast copies the whole prefix's keys at every step
        if past is None:
            kv, y = (qk[:, H:], v), []
            for place, part in rows.parts:
                qkv = (*part.unpack(qk[place]).split((H, KV), dim=2), part.unpack(v[place]))
                qkv = (t.transpose(1, 2) for t in qkv)
                out = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=H > KV)
                y.append(part.pack(out.transpose(1, 2)))
            y = torch.cat(y) if len(y) > 1 else y[0]
        else:
            q, k = rows.unpack(qk).split((H, KV), dim=2)  # (B, T, heads, D)
            v = rows.unpack(v)
            prefix_k, prefix_v, tail_k, tail_v, N = past
            Q, _, G, _, _ = tail_k.shape
            R, S = H // KV, prefix_k.shape[2]
            tail_k, k = append(tail_k, k.reshape(Q, G, T, KV, D).permute(0, 3, 1, 2, 4), N)
            tail_v, v = append(tail_v, v.reshape(Q, G, T, KV, D).permute(0, 3, 1, 2, 4), N)
            kv = tail_k, tail_v
            # the rows of a group are so many more queries to the one prefix: nothing is expanded
            q = q.reshape(Q, G, T, KV, R, D).permute(0, 3, 1, 4, 2, 5).reshape(Q, KV, G * R * T, D) * D**-0.5
            to_prefix = (q @ prefix_k.transpose(-1, -2)).view(Q, KV, G, R * T, S)
            to_tail = q.view(Q, KV, G, R * T, D) @ k.transpose(-1, -2)
            p = (torch.cat((to_prefix, to_tail), dim=-1).view(Q, KV, G, R, T, -1) + bias).flatten(3, 4)
            p = p.softmax(dim=-1, dtype=torch.promote_types(p.dtype, torch.float32)).to(v.dtype)
            to_prefix, to_tail = p.split((S, k.shape[3]), dim=-1)
            y = to_tail @ v + (to_prefix.reshape(Q, KV, G * R * T, S) @ prefix_v).view(Q, KV, G, R * T, D)
            y = rows.pack(y.view(Q, KV, G, R, T, D).permute(0, 2, 4, 1, 3, 5).reshape(B, T, H * D))
        return apply(self.o_proj, y.flatten(1), held), kv


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.sizes = [config.intermediate_size] * 2
        self.gate_up_proj = nn.Linear(config.hidden_size, sum(self.sizes), bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x, held):
        gate, up = apply(self.gate_up_proj, x, held).chunk(2, dim=-1)
        return apply(self.down_proj, F.silu(gate) * up, held)


def apply(linear, x, held):
    return linear(x) if held is None else held[linear](x)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rows, rope, past=None, bias=None, held=None):
        y, kv = self.self_attn(self.input_layernorm(x), rows, rope, past, bias, held)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x), held), kv


class LLaMA(nn.Module):
    """`LLaMA(config)` from nothing, `LLaMA.from_pretrained(dir)` from a Hugging Face checkpoint.

    model(tokens) with tokens (B, T) gives logits (B, T, vocab)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # no buffer: model.bfloat16() must not round it, and no state_dict holds it
        self.inv_freq = rope_frequencies(config)
        self.activation_checkpointing = False
        self.compiled = None  # see compile_blocks
        std = config.hidden_size ** -0.5  # about the usual 0.02 at d = 2048; a small model needs its own
        for name, p in self.named_parameters():
            if p.dim() > 1:  # GPT-2: scale the residual branches, to keep the stream's variance
                branch = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=std / math.sqrt(2 * config.num_hidden_layers) if branch else std)

    def compile_blocks(self, backend="inductor"):
        """torch.compile of the causal pass, block by block: layers share their graphs, of which there is one for each
        of with and without padding, gradients, a trained input. Passes over a tail stay eager: they are short, and
        their shapes grow with every step."""
        # policy and decoder together pass the usual limit of 8 graphs, beyond which all runs eagerly
        self.compiled = [torch.compile(layer, dynamic=True, backend=backend, recompile_limit=32) for layer in self.layers]

    def forward(self, tokens=None, embeds=None, cache=None, valid=None, at=None):
        """Logits (B, T, vocab), or (N, vocab) at the N positions where the bool mask `at` (B, T) is set."""
        h = self.hidden(tokens, embeds, cache, valid)
        return self.logits(h if at is None else h[at])

    @property
    def output_weight(self):
        """(vocab, d)"""
        return (self.lm_head or self.embed_tokens).weight

    def logits(self, h):
        return F.linear(h, self.output_weight)

    def hidden(self, tokens=None, embeds=None, cache=None, valid=None):
        """Last hidden states after the final norm (B, T, d), of token ids (B, T) or embeddings (B, T, d).

        Without `cache`, or on a new one: one causal pass at positions 0..T-1; `valid` (B, T), if given,
        marks right-padding, which no valid position can see. Later passes on the same cache add T
        columns to the tail; `valid` says in which rows each column counts (default: all)."""
        x = self.embed_tokens(tokens) if embeds is None else embeds
        B, T, _ = x.shape
        if self.inv_freq.device != x.device:
            self.inv_freq = self.inv_freq.to(x.device)
        tail = cache is not None and cache.prefix is not None
        # a GPU rather has few and large kernels
        rows = Rows(B, T, valid, parts=1 if tail or self.compiled or x.is_cuda else 4)
        if tail:
            positions, past, bias = self._extend(cache, rows, valid, x)
        else:
            positions = torch.arange(T, device=x.device).expand(B, T)
        x = rows.pack(x)
        angles = rows.pack(positions)[:, None, None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)           # (N, 1, D)
        rope = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        kv = []
        for i, layer in enumerate(self.layers if tail or not self.compiled else self.compiled):
            args = (x, rows, rope, past[i], bias, cache.held) if tail else (x, rows, rope)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, layer_kv = checkpoint(layer, *args, use_reentrant=False)
            else:
                x, layer_kv = layer(*args)
            kv.append(layer_kv)
        if tail:
            cache.tail = kv
        elif cache is not None:
            self._start(cache, kv, rows, valid, x)
        return rows.unpack(self.norm(x))

    def _start(self, cache, kv, rows, valid, x):
        cache.prefix = [tuple(rows.unpack(t).transpose(1, 2).contiguous() for t in layer) for layer in kv]
        cache.next_position = torch.full((rows.B,), rows.T, device=x.device)
        if not rows.full:
            cache.next_position = valid.sum(dim=1)
            cache.prefix_bias = x.new_zeros(valid.shape).masked_fill_(~valid, -math.inf)[:, None, None, None, None]
        if torch.is_grad_enabled() and x.requires_grad:
            linears = (m for m in self.layers.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad)
            cache.held = {m: HeldLinear(m) for m in linears} or None

    @staticmethod
    def _extend(cache, rows, valid, x):
        """Positions (B, T) of T new columns, per-layer past, and the bias: built once a pass, not in every layer."""
        B, T, G = rows.B, rows.T, cache.group
        Q = B // G
        if valid is None:
            valid = torch.ones(B, T, dtype=torch.bool, device=x.device)
        positions = (cache.next_position[:, None] + valid.cumsum(dim=1) - 1).clamp_(min=0)
        cache.next_position = cache.next_position + valid.sum(dim=1)
        k = cache.prefix[0][0]
        if cache.tail is None:
            empty = k.new_empty(Q, k.shape[1], G, 0, k.shape[3])
            cache.tail, cache.valid = [(empty, empty)] * len(cache.prefix), valid
        else:
            cache.valid = torch.cat((cache.valid, valid), dim=1)
        N = cache.valid.shape[1]
        seen = cache.valid[:, None] & torch.ones(T, N, dtype=torch.bool, device=x.device).tril(N - T)
        bias = x.new_zeros(B, T, N).masked_fill_(~seen, -math.inf).view(Q, 1, G, 1, T, N)
        prefix = x.new_zeros(()) if cache.prefix_bias is None else cache.prefix_bias
        bias = torch.cat((prefix.expand(Q, 1, G, 1, T, k.shape[2]), bias), dim=-1)
        return positions, [(*p, *t, N - T) for p, t in zip(cache.prefix, cache.tail)], bias

    @torch.no_grad()
    def add_tokens(self, ids, like=None):
        """Rows `ids` become copies of row `like`, or of the mean row; the vocabulary grows where they lie beyond it."""
        size = max(self.config.vocab_size, *(i + 1 for i in ids))
        for module in filter(None, (self.embed_tokens, self.lm_head)):
            w = module.weight
            row = w.mean(dim=0) if like is None else w[like]
            grown = torch.cat((w, row.expand(size - len(w), -1)))
            grown[ids] = row
            module.weight = nn.Parameter(grown)
        self.embed_tokens.num_embeddings = self.config.vocab_size = size
        if self.lm_head is not None:
            self.lm_head.out_features = size

    # --- checkpoints: Hugging Face's layout and names ---

    def disk_parts(self):
        """{name in a Hugging Face file: the tensor, without gradient}: what is one matrix here is several there."""
        parts = {}
        for name, p in self.named_parameters():
            owner, _, leaf = name.removesuffix(".weight").rpartition(".")
            split = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}.get(leaf)
            prefix = "" if leaf == "lm_head" else f"model.{owner}." if owner else "model."
            sizes = [len(p)] if split is None else self.get_submodule(owner).sizes
            for part, rows in zip(split or [leaf], p.detach().split(sizes)):
                parts[f"{prefix}{part}.weight"] = rows
        return parts

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Read config.json and model.safetensors (or the shards of model.safetensors.index.json).

        Peak memory is the model in `dtype` and a buffer of some MB. FileNotFoundError where a file is missing,
        ValueError naming file and key where it is not a LLaMA that this code can run; both before anything is
        allocated."""
        path = Path(path)
        file = path / "config.json"
        try:
            config = LLaMAConfig.from_dict(read_json(file))
        except (ValueError, TypeError) as e:
            raise ValueError(f"{file}: {str(e).removeprefix(f'{file}: ')}") from None
        index = tensor_index(path)
        if config.num_hidden_layers > len(index):  # or millions of modules would be built, only to find them missing
            raise ValueError(f"{file}: num_hidden_layers is {config.num_hidden_layers}, "
                             f"but there are only {len(index)} tensors")
        with torch.device("meta"):
            model = cls(config)
        model.inv_freq = rope_frequencies(config)  # the one tensor that is no parameter
        wanted = model.disk_parts()
        for name, p in wanted.items():
            if name not in index:
                raise ValueError(f"{path}: tensor {name} is missing")
            file, shape, kind, _ = index[name]
            if shape != tuple(p.shape):
                raise ValueError(f"{file}: tensor {name} has shape {short(shape)}, config.json says {tuple(p.shape)}")
            if kind not in FLOATS:
                raise ValueError(f"{file}: tensor {name} has dtype {kind}, not a plain float")
        # a tied checkpoint may hold the output matrix twice; old ones hold rotary tables
        spare = {n for n in index.keys() - wanted.keys() if n != "lm_head.weight" and "rotary_emb" not in n}
        if spare:
            raise ValueError(f"{index[min(spare)][0]}: tensor {repr(min(spare))[:200]} is not part of this architecture")
        model = model.to(dtype).to_empty(device=device)
        for name, out in model.disk_parts().items():
            file, _, kind, start = index[name]
            read_tensor(file, FLOATS[kind], start, out)
        return model

    def save_pretrained(self, path):
        """Write config.json and model.safetensors, which transformers' LlamaForCausalLM opens."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        save_tensors(self.disk_parts(), path / "model.safetensors")
        write_json(path / "config.json", self.config.to_dict())


FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # on disk


def read_json(file):
    """ValueError that names file and place, FileNotFoundError that names the file."""
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{file}: no such file") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file}: not valid JSON ({e})") from None


def write_json(file, value):
    with open(file, "w", encoding="utf-8") as f:
        f.write(json.dumps(value, indent=2) + "\n")
        f.flush()
        os.fsync(f.fileno())


def save_tensors(tensors, file):
    try:
        save_file({n: t.detach().contiguous() for n, t in tensors.items()}, file, metadata={"format": "pt"})
    except SafetensorError as e:  # how the library says that the disk is full
        raise OSError(f"{file}: {e}") from None
    with open(file, "rb+") as f:
        os.fsync(f.fileno())


def tensor_index(path):
    """{tensor name: (file, shape, dtype name, first byte's place)} of a directory's model.safetensors or of shards."""
    whole, table = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.exists():
        files = {None: whole}
    elif table.exists():
        weight_map = read_json(table)
        weight_map = weight_map.get("weight_map") if isinstance(weight_map, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(s, str) for s in weight_map.values()):
            raise ValueError(f"{table}: key 'weight_map' must map tensor names to file names")
        for shard in weight_map.values():
            # the name comes from a file: it must not lead out of the directory
            odd = "/" in shard or "\\" in shard or not shard.isprintable() or shard in ("", ".", "..")
            if odd or len(shard) > 255:
                raise ValueError(f"{table}: shard name {short(shard)} is not a plain file name in this directory")
        files = {shard: path / shard for shard in sorted(set(weight_map.values()))}
    else:
        raise FileNotFoundError(f"{path}: neither model.safetensors nor model.safetensors.index.json is there")
    index = {}
    for shard, file in files.items():
        for name, entry in tensor_headers(file).items():
            if shard is None or weight_map.get(name) == shard:
                index[name] = (file, *entry)
    if None not in files:
        for name, shard in weight_map.items():
            if name not in index:
                raise ValueError(f"{files[shard]}: tensor {repr(name)[:200]} is not in it, though {table.name} says so")
    return index


def tensor_headers(file):
    """{tensor name: (shape, dtype name, place of its first byte)}, reading only the file's header."""
    try:
        with safe_open(file, framework="pt"):  # the library holds the header against the file
            pass
        with open(file, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(size))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None
    except (SafetensorError, OSError) as e:
        said = str(e).encode("unicode_escape").decode()[:300]  # it quotes the file
        raise ValueError(f"{file}: not a readable safetensors file ({said})") from None
    header.pop("__metadata__", None)
    return {name: (tuple(e["shape"]), e["dtype"], 8 + size + e["data_offsets"][0]) for name, e in header.items()}


def read_tensor(file, dtype, start, out, chunk=2**22):
    """Fill a contiguous `out` from the numbers of `dtype` that begin at byte `start` of a file.

    They are read straight into it, or, where it has another dtype or is on another device, in parts of `chunk` elements
    through one buffer: new memory is slow, and a file mapped whole would count as the process's own."""
    straight = out.dtype == dtype and out.device.type == "cpu"
    buffer = None if straight else torch.empty(min(chunk, out.numel()), dtype=dtype)
    with open(file, "rb", buffering=0) as f:
        f.seek(start)
        for part in out.view(-1).split(chunk):
            raw = part if straight else buffer[:len(part)]
            if f.readinto(raw.view(torch.uint8).numpy()) < raw.nbytes:
                raise ValueError(f"{file}: it ends before its tensors do")
            if not straight:
                part.copy_(raw)
