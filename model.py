"""LLaMA in one file: RMSNorm, rotary positions (plain and Llama-3 scaled), grouped-query attention, SwiGLU.

It reads and writes Hugging Face checkpoints. Only the cache differs from other small LLaMAs. Latent
reasoning reads a question in one wide pass. It then goes on one position at a time, with gradients, and in
reinforcement learning with several continuations of one question. So keys and values lie in two segments:

    prefix   (Q, KV, S, D)      the question, right-padded, computed once, shared by a group of G rows
    tail     (Q, KV, G, N, D)   what came since; row b of the batch is (b // G, b % G)

The tail has all its N columns from the start, and a mask says which of them count in which row. So every
latent is the same computation on the same shapes, and one compiled block serves all of them.
"""

import json
import math
import os
import re
import sys
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
SUPPORTED = {  # values of config.json that this code can run; a missing key means the first
    "model_type": ("llama",), "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,),
    "quantization_config": (None,), "rope_type": ("default", "llama3"), "partial_rotary_factor": (1.0,),
    "tie_word_embeddings": (False, True),
}


@dataclass
class LLaMAConfig:
    """The fields of a Hugging Face LlamaConfig that this architecture needs, under their names there."""

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
        numbers = {f.name: (f.type, getattr(self, f.name)) for f in fields(self) if f.type in (int, float)}
        if self.rope_scaling:
            numbers |= {key: (float, self.rope_scaling.get(key)) for key in LLAMA3_ROPE}
        for name, (kind, value) in numbers.items():
            most = 2**24 if kind is int else 1e38
            if type(value) not in (int, kind) or not 0 < value <= most:
                raise ValueError(f"{name} must be a positive {kind.__name__} up to {most}, not {value!r}")
        self.rms_norm_eps, self.rope_theta = float(self.rms_norm_eps), float(self.rope_theta)
        rope = self.rope_scaling
        if rope and rope["low_freq_factor"] >= rope["high_freq_factor"]:
            raise ValueError("rope_scaling needs low_freq_factor < high_freq_factor")
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads, head_dim even")
        ends = self.eos_token_id if isinstance(self.eos_token_id, list) else []
        if not all(type(i) is int and abs(i) < 2**31 for i in ends):
            raise ValueError(f"eos_token_id must be integers, not {ends!r}")

    @classmethod
    def from_dict(cls, raw):
        """From a config.json of transformers 4 or 5. ValueError or TypeError says what does not fit."""
        defaults = {"rms_norm_eps": 1e-6, **{key: values[0] for key, values in SUPPORTED.items()}}
        raw = {**defaults, **raw}
        # transformers 5 writes rope_parameters, published checkpoints have rope_theta and rope_scaling
        rope = {**(raw.get("rope_scaling") or raw.get("rope_parameters") or {})}
        rope.setdefault("rope_type", rope.get("type", "default"))
        raw |= {**rope, "rope_scaling": rope if rope["rope_type"] == "llama3" else None}
        for key, values in SUPPORTED.items():
            if raw[key] not in values:
                raise ValueError(f"{key} {raw[key]!r} is not supported (only {', '.join(map(repr, values))})")
        if raw.get("num_key_value_heads") is None:
            raw["num_key_value_heads"] = raw["num_attention_heads"]
        if raw.get("head_dim") is None:
            raw["head_dim"] = raw["hidden_size"] // raw["num_attention_heads"]
        return cls(**{f.name: raw[f.name] for f in fields(cls) if f.name in raw})

    def to_dict(self):
        """A config.json that transformers 4 and 5 both open."""
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                "attention_bias": False, "mlp_bias": False, **asdict(self)}


def rope_frequencies(config):
    """Rotation per position of each pair of dimensions, float32 (head_dim / 2,). Llama-3 scaling is Meta's:
    slow rotations are stretched by `factor`, fast ones kept, those between interpolated."""
    freq = config.rope_theta ** -(torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    if config.rope_scaling is None:
        return freq
    factor, low, high, context = (float(config.rope_scaling[key]) for key in LLAMA3_ROPE)
    turns = context * freq / (2 * math.pi)  # rotations within the old context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * freq / factor + smooth * freq


def rotate(x, cos, sin):
    """Rotary embedding of x (..., D), the halves of D kept apart as Hugging Face stores them."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def first(counts, width):
    """Bool mask (B, width) of the first counts (B,) places of each row."""
    return torch.arange(width, device=counts.device) < counts[:, None]


def product_dtype(x):
    """The dtype of matrix products with x: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def gather(x, places):
    """x (B, T, ...) -> (1, M, ...): what lies at `places` (M,) of the flat (B * T)."""
    return x.flatten(0, 1).index_select(0, places)[None]


def spread(x, places, shape):
    """The reverse of gather, to a (B, T, ...) of the given shape (B, T), with zeros at other places."""
    whole = x.new_zeros(shape[0] * shape[1], *x.shape[2:])
    return whole.index_copy(0, places, x[0]).unflatten(0, shape)


def bias_of(mask, dtype):
    """What is added to attention's scores: 0 where the mask is set, -inf elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -math.inf)


class KVCache:
    """Keys and values of a prefix and of the tail since (see the top of this file).

    size: columns of the tail, N. group: rows of the batch that continue each row of the prefix, G."""

    def __init__(self, size, group=1):
        self.size, self.group = size, group
        self.prefix = None         # per layer: k, v (Q, KV, S, D)
        self.tail = None           # per layer: k, v (Q, KV, G, N, D)
        self.prefix_bias = None    # (Q, 1, 1, 1, 1, S): 0, or -inf at padding
        self.counts = None         # (B, N) bool: the columns of the tail that count
        self.filled = 0            # columns of the tail that are written
        self.next_position = None  # (B,) position of each row's next token
        self.weights = None        # per layer: Block.weights, cast once and not at every position

    def start(self, kv, valid, dtype):
        """Keep kv of the first pass and make an empty tail. `valid` (Q, S) marks what is no padding."""
        self.prefix = [(k.contiguous(), v.contiguous()) for k, v in kv]
        k = kv[0][0]
        Q, KV, _, D = k.shape

        def empty():  # it needs a gradient as later tails do: else the first latent has a graph of its own
            return k.new_zeros((Q, KV, self.group, self.size, D), requires_grad=k.requires_grad)

        shared = empty(), empty()
        # without gradients columns are written in place, so every layer needs a tail of its own
        self.tail = [shared if torch.is_grad_enabled() else (empty(), empty()) for _ in kv]
        self.prefix_bias = bias_of(valid, dtype)[:, None, None, None, None]
        self.counts = valid.new_zeros(Q * self.group, self.size)
        self.next_position = valid.sum(dim=1).repeat_interleave(self.group)

    def extend(self, valid, dtype):
        """Add T columns, which count where `valid` (B, T) is set. Returns their positions (B, T), their
        places in the tail (T,) and the bias of attention (Q, 1, G, 1, T, S + N)."""
        (B, T), G, S = valid.shape, self.group, self.prefix_bias.shape[-1]
        columns = torch.arange(self.filled, self.filled + T, device=valid.device)
        self.filled += T
        positions = (self.next_position[:, None] + valid.cumsum(dim=1) - 1).clamp(min=0)
        self.next_position = self.next_position + valid.sum(dim=1)
        self.counts = self.counts.index_copy(1, columns, valid)
        earlier = torch.arange(self.size, device=valid.device) <= columns[:, None]             # (T, N)
        to_tail = bias_of(self.counts[:, None] & earlier, dtype).view(B // G, 1, G, 1, T, self.size)
        to_prefix = self.prefix_bias.expand(B // G, 1, G, 1, T, S)
        return positions, columns, torch.cat((to_prefix, to_tail), dim=-1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim  # queries, keys, values
        self.qkv_proj = nn.Linear(config.hidden_size, rows, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x, rope, qkv_weight, o_weight, past=None, places=None, shape=None):
        """x (B, T, d) -> y (B, T, d), (k, v). Without `past` this is a causal pass, with k, v (B, KV, T, D).
        With `past`, (prefix k, v, tail k, v, columns, bias), k and v are the tail with the new columns.
        With `places`, x and y (1, M, d) hold those places of a flat (B * T); shape: (B, T)."""
        H, KV, D = self.heads, self.kv_heads, self.head_dim
        qkv = F.linear(x, qkv_weight).unflatten(-1, (H + 2 * KV, D))               # (B, T, heads, D)
        qk, v = qkv.split((H + KV, KV), dim=2)
        q, k = rotate(qk, *rope).to(v.dtype).split((H, KV), dim=2)
        if past is None:
            if places is not None:
                q, k, v = (spread(t, places, shape) for t in (q, k, v))
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))                       # (B, heads, T, D)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H > KV)
            y, kv = y.transpose(1, 2), (k, v)
            if places is not None:
                y = gather(y, places)
        else:
            y, kv = self.attend_to_both(q, k, v, *past)
        return F.linear(y.flatten(2), o_weight), kv

    def attend_to_both(self, q, k, v, prefix_k, prefix_v, tail_k, tail_v, columns, bias):
        """Write T columns into the tail, then attend to prefix and tail. Letters: q question, g row of its
        group, t query, k key-value head, r its query head, s column of the prefix, n of the tail."""
        (Q, KV, G, N, D), T = tail_k.shape, q.shape[1]
        k, v = (t.unflatten(0, (Q, G)).permute(0, 3, 1, 2, 4) for t in (k, v))     # (Q, KV, G, T, D)
        # autograd needs every version of the tail
        write = torch.index_copy if torch.is_grad_enabled() else torch.Tensor.index_copy_
        tail_k, tail_v = write(tail_k, 3, columns, k), write(tail_v, 3, columns, v)
        q = q.unflatten(0, (Q, G)).unflatten(3, (KV, -1)) * D**-0.5                # (Q, G, T, KV, R, D)
        # the rows of a group are so many more queries to the one prefix: nothing is expanded
        to_prefix = torch.einsum("qgtkrd,qksd->qkgrts", q, prefix_k)
        to_tail = torch.einsum("qgtkrd,qkgnd->qkgrtn", q, tail_k)
        scores = torch.cat((to_prefix, to_tail), dim=-1) + bias                    # (Q, KV, G, R, T, S + N)
        p = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
        to_prefix, to_tail = p.split((prefix_k.shape[2], N), dim=-1)
        y = torch.einsum("qkgrts,qksd->qgtkrd", to_prefix, prefix_v)
        y = y + torch.einsum("qkgrtn,qkgnd->qgtkrd", to_tail, tail_v)
        return y.reshape(Q * G, T, -1, D), (tail_k, tail_v)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x, gate_up_weight, down_weight):
        gate, up = F.linear(x, gate_up_weight).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down_weight)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def weights(self, dtype):
        """The four matrices in the dtype of the products."""
        linears = self.self_attn.qkv_proj, self.self_attn.o_proj, self.mlp.gate_up_proj, self.mlp.down_proj
        return tuple(linear.weight.to(dtype) for linear in linears)

    def forward(self, x, rope, weights, past=None, places=None, shape=None):
        """x (B, T, d) -> x (B, T, d) and the keys and values of Attention.forward, for its arguments."""
        qkv, o, gate_up, down = weights
        y, kv = self.self_attn(self.input_layernorm(x), rope, qkv, o, past, places, shape)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x), gate_up, down), kv


class LLaMA(nn.Module):
    """`LLaMA(config)` has random weights, `LLaMA.from_pretrained(dir)` those of a Hugging Face checkpoint."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.inv_freq = rope_frequencies(config)  # no buffer: model.bfloat16() must not round it
        self.run_block = Block.forward  # compile_blocks puts a compiled one in its place
        self.activation_checkpointing = False
        std = config.hidden_size ** -0.5  # about the usual 0.02 at d = 2048; a small model needs its own
        for name, p in self.named_parameters():
            if p.dim() > 1:  # GPT-2: scale the residual branches, to keep the stream's variance
                branch = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=std / math.sqrt(2 * config.num_hidden_layers) if branch else std)

    def compile_blocks(self, backend="inductor"):
        """All layers share the graphs of one compiled block: one graph for each kind of pass (wide or over a
        tail, with gradients or without), with sizes left open."""
        torch._dynamo.config.recompile_limit = 64  # there are more kinds of passes than the usual 8
        torch.fx.experimental._config.use_duck_shape = False  # sizes that are equal once need not stay so
        self.run_block = torch.compile(Block.forward, dynamic=True, backend=backend)

    def forward(self, tokens=None, embeds=None, cache=None, valid=None):
        """Logits (B, T, vocab) of what `hidden` takes."""
        return self.logits(self.hidden(tokens, embeds, cache, valid))

    def output_weight(self):
        """(vocab, d) and zero rows up to a multiple of 64: a GPU's kernels are slow on an odd vocabulary."""
        weight = (self.lm_head or self.embed_tokens).weight
        odd = -len(weight) % 64
        return F.pad(weight, (0, 0, 0, odd)) if odd else weight

    def logits(self, h):
        return F.linear(h, self.output_weight())[..., :self.config.vocab_size]

    def hidden(self, tokens=None, embeds=None, cache=None, valid=None, places=None):
        """Last hidden states after the final norm (B, T, d), of token ids (B, T) or embeddings (B, T, d).

        Without `cache`, or on a new one, this is a causal pass at positions 0..T-1, and `valid` (B, T) marks
        what is no right-padding. `places` (M,) says the same in the flat (B * T): padding is then left out of
        all but attention. Later passes add T columns to the tail, which count where `valid` is set."""
        if embeds is None:
            x = self.embed_tokens(tokens)
        else:  # a copy, since torch.compile guards on what a view is a view of
            x = embeds.clone(memory_format=torch.contiguous_format)
        B, T, _ = x.shape
        if valid is None:
            valid = torch.ones(B, T, dtype=torch.bool, device=x.device)
        cache = KVCache(0) if cache is None else cache
        starts = cache.prefix is None
        if starts:
            positions, past = torch.arange(T, device=x.device)[None], [None] * len(self.layers)
            if places is not None:
                x, positions = gather(x, places), (places % T)[None]
            cache.weights = [layer.weights(product_dtype(x)) for layer in self.layers]
        else:
            positions, columns, bias = cache.extend(valid, x.dtype)
            past = [(*prefix, *tail, columns, bias) for prefix, tail in zip(cache.prefix, cache.tail)]
        run, rope, kv = self.run_block, self.rope(positions, x), []
        # a wide pass keeps much for backward and is cheap to repeat; of single positions the reverse is true
        if self.activation_checkpointing and T > 1 and torch.is_grad_enabled():
            run = partial(checkpoint, run, use_reentrant=False)
        for layer, weights, seen in zip(self.layers, cache.weights, past):
            x, layer_kv = run(layer, x, rope, weights, seen, places, (B, T))
            kv.append(layer_kv)
        if not starts:
            cache.tail = kv
        elif cache.size:
            cache.start(kv, valid, x.dtype)
        return self.norm(x) if places is None else spread(self.norm(x), places, (B, T))

    def rope(self, positions, x):
        """Cosines and sines of positions (B, T), each (B, T, 1, D), in x's dtype and on its device."""
        self.inv_freq = self.inv_freq.to(x.device)
        angles = positions[..., None, None].float() * self.inv_freq.repeat(2)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    @torch.no_grad()
    def add_tokens(self, ids, like=None):
        """Rows `ids`, old or new, become copies of row `like` or of the mean row. The vocabulary grows to
        hold them."""
        size = max(self.config.vocab_size, *(i + 1 for i in ids))
        for module in filter(None, (self.embed_tokens, self.lm_head)):
            w = module.weight
            row = w.mean(dim=0) if like is None else w[like]
            grown = torch.cat((w, row.expand(size - len(w), -1)))
            grown[ids] = row
            module.weight = nn.Parameter(grown)
        self.config.vocab_size = size

    def disk_parts(self):
        """{name in a Hugging Face file: tensor}. What is one matrix here is several there."""
        c, wide = self.config, self.config.intermediate_size
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        split = {"qkv_proj": {"q_proj": q, "k_proj": kv, "v_proj": kv},
                 "gate_up_proj": {"gate_proj": wide, "up_proj": wide}}
        parts = {}
        for name, p in self.named_parameters():
            owner = name.split(".")[-2]
            rows = split.get(owner, {owner: len(p)})
            prefix = "" if owner == "lm_head" else "model."
            for part, tensor in zip(rows, p.detach().split(list(rows.values()))):
                parts[prefix + name.replace(owner, part)] = tensor
        return parts

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Read a folder's config.json and model.safetensors, whole or sharded. Peak memory is the model in
        `dtype` and a part of a tensor. ValueError and FileNotFoundError name the file."""
        path = Path(path)
        file, raw, found = path / "config.json", read_json(path / "config.json"), tensor_files(path)
        try:
            config = LLaMAConfig.from_dict(raw)
            if config.num_hidden_layers > len(found):  # or millions of modules would be built
                raise ValueError("num_hidden_layers is more than there are tensors")
            with torch.device("meta"):
                model = cls(config)
        except (ValueError, TypeError, KeyError, ArithmeticError, RuntimeError) as e:
            raise ValueError(f"{file}: {one_line(e)}") from None
        wanted = model.disk_parts()
        twice = config.tie_word_embeddings and "lm_head.weight" in found
        if twice:
            wanted["lm_head.weight"] = wanted["model.embed_tokens.weight"]
        check_tensors(found, wanted, path)
        model = model.to(dtype).to_empty(device=device)
        model.inv_freq = rope_frequencies(config)  # the one tensor that is no parameter
        for name, out in model.disk_parts().items():
            for rows, part in read_tensor(*found[name]):
                out[rows] = part
        table = model.embed_tokens.weight
        for rows, part in read_tensor(*found["lm_head.weight"]) if twice else ():
            if not torch.equal(table[rows], part.to(table)):
                file = found["lm_head.weight"][0]
                raise ValueError(f"{file}: lm_head.weight is not embed_tokens.weight, though config.json "
                                 "ties them (set tie_word_embeddings to false)")
        return model

    def save_pretrained(self, path):
        """Write config.json and model.safetensors, which transformers' LlamaForCausalLM opens."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        save_tensors(self.disk_parts(), path / "model.safetensors")
        write_json(path / "config.json", self.config.to_dict())


# --- files ---

def one_line(text):
    """Printable and short, since it may quote a hostile file."""
    return str(text).encode("unicode_escape").decode()[:300]


def read_json(file):
    """The contents of a JSON file. ValueError and FileNotFoundError name it."""
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except NotADirectoryError as e:
        raise FileNotFoundError(str(e)) from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file}: not valid JSON ({one_line(e)})") from None


def write_json(file, value):
    with open(file, "w", encoding="utf-8") as f:
        f.write(json.dumps(value, indent=2) + "\n")
        f.flush()
        os.fsync(f.fileno())


def save_tensors(tensors, file):
    """Write {name: tensor}. OSError where the disk is full."""
    try:
        save_file({n: t.detach().contiguous() for n, t in tensors.items()}, file, metadata={"format": "pt"})
    except SafetensorError as e:
        raise OSError(f"{file}: {e}") from None
    with open(file, "rb+") as f:
        os.fsync(f.fileno())


def tensor_files(path):
    """tensor_headers of a folder's model.safetensors or, without one, of its shards."""
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    shards = [whole.name]
    if whole.exists() and index.exists():
        print(f"note: {whole} is read, not the shards of {index.name}", file=sys.stderr)
    elif index.exists():
        raw = read_json(index)
        try:
            shards = sorted(set(raw["weight_map"].values()))
            plain = all(re.fullmatch(r"[\w-][\w.-]{0,200}", name) for name in shards)  # not out of path
        except (TypeError, KeyError, AttributeError):
            plain = False
        if not plain:
            raise ValueError(f"{index}: weight_map must map tensor names to names of files in this folder")
    found = {}
    for shard in shards:
        found |= tensor_headers(path / shard)
    return found


def tensor_headers(file):
    """{tensor name: (file, name there, shape, dtype name)} of a safetensors file."""
    try:
        with safe_open(file, framework="pt") as f:
            parts = {name: f.get_slice(name) for name in f.keys()}
            return {name.removeprefix("_orig_mod."): (file, name, tuple(part.get_shape()), part.get_dtype())
                    for name, part in parts.items()}  # a compiled model was saved with this prefix
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{file}: not a readable safetensors file ({one_line(e)})") from None


def check_tensors(found, wanted, path):
    """ValueError unless the tensors found are just those wanted, {name: tensor}, in plain floats."""
    for name, p in wanted.items():
        if name not in found:
            raise ValueError(f"{path}: tensor {name} is missing")
        file, _, shape, dtype = found[name]
        if shape != tuple(p.shape) or dtype not in ("F64", "F32", "F16", "BF16"):
            is_now = one_line(f"{dtype} {shape}")
            raise ValueError(f"{file}: tensor {name} is {is_now}, not floats {tuple(p.shape)}")
    for name in found.keys() - wanted.keys():
        if "rotary_emb" not in name:  # old checkpoints hold rotary tables
            raise ValueError(f"{found[name][0]}: tensor {one_line(name)} is not part of this architecture")


def read_tensor(file, name, shape, dtype):
    """Parts of a tensor, as (rows of it, their numbers). The file is opened anew for each part: its pages
    count as the process's memory for as long as it is open."""
    step = 2**24 // shape[-1] + 1
    for start in range(0, shape[0], step):
        rows = slice(start, start + step)
        with safe_open(file, framework="pt") as f:
            yield rows, f.get_slice(name)[rows]
