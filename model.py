"""LLaMA in one file: RMSNorm, rotary positions (plain and Llama-3 scaled), grouped-query attention, SwiGLU.

It reads and writes Hugging Face checkpoints (config.json + safetensors, whole or sharded). The one thing that
differs from other small LLaMAs is the cache. Latent reasoning reads a question in one wide pass. It then goes on
one position at a time, with gradients, and in reinforcement learning with several continuations of one question.
So keys and values lie in two segments:

    prefix   (Q, KV, S, D)      the question, right-padded, computed once, shared by a group of G rows
    tail     (Q, KV, G, N, D)   what came since; row b of the batch is (b // G, b % G)

The tail has all its N columns from the start. A mask says which of them count in which row. Every latent is then
the same computation on the same shapes, so one compiled block serves all of them.
"""

import json
import math
import os
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from reprlib import repr as short

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "max_position_embeddings")
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


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
        for name in SIZES:
            value = getattr(self, name)
            if type(value) is not int or not 0 < value <= 2**24:
                raise ValueError(f"{name} must be an integer from 1 to {2**24}, not {short(value)}")
        numbers = {"rms_norm_eps": self.rms_norm_eps, "rope_theta": self.rope_theta}
        if self.rope_scaling is not None:
            numbers |= {f"rope_scaling's {key}": self.rope_scaling.get(key) for key in LLAMA3_ROPE}
        for name, value in numbers.items():
            if type(value) not in (int, float) or not 0 < value < 1e38:
                raise ValueError(f"{name} must be a positive number, not {short(value)}")
        rope = self.rope_scaling
        if rope and rope["low_freq_factor"] >= rope["high_freq_factor"]:
            raise ValueError("rope_scaling needs low_freq_factor < high_freq_factor")
        self.rms_norm_eps, self.rope_theta = float(self.rms_norm_eps), float(self.rope_theta)
        if type(self.tie_word_embeddings) is not bool:
            raise ValueError(f"tie_word_embeddings must be true or false, not {short(self.tie_word_embeddings)}")
        eos = self.eos_token_id
        for name, ids in (("bos_token_id", [self.bos_token_id]), ("eos_token_id", eos if type(eos) is list else [eos])):
            if any(type(i) not in (int, type(None)) for i in ids):
                raise ValueError(f"{name} must be an integer, not {short(ids)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        if self.head_dim % 2:
            raise ValueError("head_dim must be even: rotary embedding turns pairs of dimensions")

    @classmethod
    def from_dict(cls, raw):
        """From the contents of a config.json. ValueError names what this architecture has not."""
        if not isinstance(raw, dict):
            raise ValueError("it is not a JSON object")
        raw = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, **raw}  # LlamaConfig's own defaults
        # transformers 5 writes rope_parameters, published checkpoints have rope_theta and rope_scaling
        for key in ("rope_parameters", "rope_scaling"):
            if not isinstance(raw.get(key), (dict, type(None))):
                raise ValueError(f"{key} must be an object, not {short(raw[key])}")
        rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})  # transformers' preference
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        raw["rope_theta"] = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
        partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
        found = {"model_type": raw.get("model_type"), "hidden_act": raw.get("hidden_act", "silu"),
                 "attention_bias": raw.get("attention_bias", False), "mlp_bias": raw.get("mlp_bias", False),
                 "quantization_config": raw.get("quantization_config"), "partial_rotary_factor": partial}
        wanted = dict(model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False,
                      quantization_config=None, partial_rotary_factor=1.0)
        for key, value in wanted.items():
            if found[key] != value:
                raise ValueError(f"{key} {short(found[key])} is not supported (only {value!r})")
        if kind not in ("default", "llama3"):
            raise ValueError(f"rope_type {short(kind)} is not supported (only 'default' and 'llama3')")
        raw["rope_scaling"] = {**rope, "rope_type": kind} if kind == "llama3" else None
        heads, width = raw.get("num_attention_heads"), raw.get("hidden_size")
        if raw.get("num_key_value_heads") is None:
            raw["num_key_value_heads"] = heads
        if raw.get("head_dim") is None and type(heads) is type(width) is int and heads > 0:
            if width % heads:
                raise ValueError("hidden_size is not a multiple of num_attention_heads, and there is no head_dim")
            raw["head_dim"] = width // heads
        missing = [name for name in SIZES[:7] if name not in raw]
        if missing:
            raise ValueError(f"key {missing[0]!r} is missing")
        return cls(**{f.name: raw[f.name] for f in fields(cls) if f.name in raw})

    def to_dict(self):
        """A config.json that transformers 4 and 5 both open."""
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                "attention_bias": False, "mlp_bias": False, **asdict(self)}


def rope_frequencies(config):
    """Rotation per position of each pair of dimensions, float32 (head_dim / 2,).

    Llama-3 scaling, as in Meta's llama-models: wavelengths longer than the original context / low_freq_factor
    are stretched by `factor`, those shorter than context / high_freq_factor are kept, those between are
    interpolated."""
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


class KVCache:
    """Keys and values of a prefix and of the tail since. See the top of this file."""

    def __init__(self, size, group=1):
        """size: columns of the tail, N. group: rows of the batch that continue each row of the prefix, G."""
        self.size, self.group = size, group
        self.prefix = None         # per layer: k, v (Q, KV, S, D)
        self.tail = None           # per layer: k, v (Q, KV, G, N, D)
        self.prefix_bias = None    # (Q, 1, 1, 1, 1, S): 0, or -inf at padding
        self.counts = None         # (B, N) bool: the columns of the tail that count
        self.filled = 0            # columns of the tail that are written
        self.next_position = None  # (B,) position of each row's next token
        self.weights = None        # per layer: Block.weights, cast once and not at every position

    def start(self, kv, valid, dtype):
        """Keep the keys and values of the first pass, with `valid` (Q, S) what is no padding, and an empty tail."""
        self.prefix = [tuple(t.contiguous() for t in layer) for layer in kv]
        Q, KV, S, D = self.prefix[0][0].shape
        empty = kv[0][0].new_zeros(Q, KV, self.group, self.size, D)
        # without gradients columns are written in place: then every layer needs a tail of its own
        own = torch.clone if not torch.is_grad_enabled() else torch.Tensor.detach
        self.tail = [(own(empty), own(empty)) for _ in kv]
        self.prefix_bias = bias_of(valid, dtype)[:, None, None, None, None]
        self.counts = valid.new_zeros(Q * self.group, self.size)
        self.next_position = valid.sum(dim=1).repeat_interleave(self.group)

    def extend(self, valid, dtype):
        """T new columns, which count where `valid` (B, T) is set. Returns their positions (B, T), their places
        in the tail (T,) and the bias of attention (Q, 1, G, 1, T, S + N)."""
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


def product_dtype(x):
    """The dtype of matrix products with x: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def bias_of(mask, dtype):
    """0 where the mask is set, -inf elsewhere: what is added to attention's scores."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -math.inf)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.sizes = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.sizes), bias=False)  # queries, keys, values
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x, rope, qkv_weight, o_weight, past=None):
        """x (B, T, d) -> y (B, T, d), (k, v). Without `past` this is a causal pass, with k, v (B, KV, T, D).
        With `past`, (prefix k, v, tail k, v, columns, bias), k and v are the tail with the new columns."""
        H, KV, D = self.heads, self.kv_heads, self.head_dim
        qkv = F.linear(x, qkv_weight).unflatten(-1, (H + 2 * KV, D))               # (B, T, heads, D)
        qk, v = qkv.split((H + KV, KV), dim=2)
        q, k = rotate(qk, *rope).to(v.dtype).split((H, KV), dim=2)
        if past is None:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))                       # (B, heads, T, D)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H > KV)
            y, kv = y.transpose(1, 2), (k, v)
        else:
            y, kv = self.attend_to_both(q, k, v, *past)
        return F.linear(y.flatten(2), o_weight), kv

    def attend_to_both(self, q, k, v, prefix_k, prefix_v, tail_k, tail_v, columns, bias):
        """Write T columns into the tail, then attend to prefix and tail. Letters: q question, k key-value head,
        g row of the group, r query head of k, t query, s column of the prefix, n of the tail, d dimension."""
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
        self.sizes = [config.intermediate_size] * 2
        self.gate_up_proj = nn.Linear(config.hidden_size, sum(self.sizes), bias=False)
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

    def forward(self, x, rope, weights, past=None):
        """x (B, T, d) -> x (B, T, d) and the keys and values of Attention.forward."""
        qkv, o, gate_up, down = weights
        y, kv = self.self_attn(self.input_layernorm(x), rope, qkv, o, past)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x), gate_up, down), kv


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
        self.run_block = Block.forward  # compile_blocks puts a compiled one in its place
        self.activation_checkpointing = False
        std = config.hidden_size ** -0.5  # about the usual 0.02 at d = 2048; a small model needs its own
        for name, p in self.named_parameters():
            if p.dim() > 1:  # GPT-2: scale the residual branches, to keep the stream's variance
                branch = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=std / math.sqrt(2 * config.num_hidden_layers) if branch else std)

    def compile_blocks(self, backend="inductor"):
        """torch.compile of the block. All layers share its graphs: one for each kind of pass (wide or over a tail,
        with gradients or without), with sizes left open."""
        self.run_block = torch.compile(Block.forward, dynamic=True, backend=backend)

    def forward(self, tokens=None, embeds=None, cache=None, valid=None):
        """Logits (B, T, vocab)."""
        return self.logits(self.hidden(tokens, embeds, cache, valid))

    def output_weight(self):
        """(vocab, d), with zero rows up to a multiple of 64: a GPU's kernels are slow on an odd vocabulary."""
        weight = (self.lm_head or self.embed_tokens).weight
        odd = -len(weight) % 64
        return F.pad(weight, (0, 0, 0, odd)) if odd else weight

    def logits(self, h):
        return F.linear(h, self.output_weight())[..., :self.config.vocab_size]

    def hidden(self, tokens=None, embeds=None, cache=None, valid=None):
        """Last hidden states after the final norm (B, T, d), of token ids (B, T) or embeddings (B, T, d).

        Without `cache`, or on a new one: one causal pass at positions 0..T-1; `valid` (B, T) marks what is no
        right-padding, which no valid position can see. Later passes on the same cache add T columns to the tail;
        `valid` says in which rows each column counts. Default: all."""
        x = self.embed_tokens(tokens) if embeds is None else embeds
        B, T, _ = x.shape
        if valid is None:
            valid = torch.ones(B, T, dtype=torch.bool, device=x.device)
        cache = KVCache(0) if cache is None else cache
        starts = cache.prefix is None
        if starts:
            positions, past = torch.arange(T, device=x.device)[None], [None] * len(self.layers)
            cache.weights = [layer.weights(product_dtype(x)) for layer in self.layers]
        else:
            positions, columns, bias = cache.extend(valid, x.dtype)
            past = [(*prefix, *tail, columns, bias) for prefix, tail in zip(cache.prefix, cache.tail)]
        rope, kv = self.rope(positions, x), []
        # a wide pass keeps much for backward and is cheap to repeat; of single positions the reverse is true
        repeat = self.activation_checkpointing and T > 1 and torch.is_grad_enabled()
        for layer, weights, seen in zip(self.layers, cache.weights, past):
            if repeat:
                x, layer_kv = checkpoint(self.run_block, layer, x, rope, weights, seen, use_reentrant=False)
            else:
                x, layer_kv = self.run_block(layer, x, rope, weights, seen)
            kv.append(layer_kv)
        if not starts:
            cache.tail = kv
        elif cache.size:
            cache.start(kv, valid, x.dtype)
        return self.norm(x)

    def rope(self, positions, x):
        """Cosines and sines of positions (B, T), each (B, T, 1, D), in x's dtype and on its device."""
        if self.inv_freq.device != x.device:
            self.inv_freq = self.inv_freq.to(x.device)
        angles = positions[..., None, None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    @torch.no_grad()
    def add_tokens(self, ids, like=None):
        """Rows `ids` become copies of row `like`, or of the mean row. The vocabulary grows where they lie beyond."""
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
        """{name in a Hugging Face file: the tensor, without gradient}. What is one matrix here is several there."""
        split = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
        parts = {}
        for name, p in self.named_parameters():
            owner, _, leaf = name.removesuffix(".weight").rpartition(".")
            prefix = "" if leaf == "lm_head" else f"model.{owner}." if owner else "model."
            sizes = self.get_submodule(owner).sizes if leaf in split else len(p)
            for part, rows in zip(split.get(leaf, [leaf]), p.detach().split(sizes)):
                parts[f"{prefix}{part}.weight"] = rows
        return parts

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Read config.json and model.safetensors (or the shards of model.safetensors.index.json).

        Peak memory is the model in `dtype` and one part of a tensor. FileNotFoundError where a file is missing.
        ValueError names file and key where it is not a LLaMA that this code can run, before anything is read."""
        path = Path(path)
        files = tensor_files(path)
        raw = read_json(path / "config.json")
        try:
            config = LLaMAConfig.from_dict(raw)
            if config.num_hidden_layers > len(files):  # or millions of modules would be built
                raise ValueError(f"num_hidden_layers is {config.num_hidden_layers}: more than there are tensors")
            with torch.device("meta"):
                model = cls(config)
            model.inv_freq = rope_frequencies(config)  # the one tensor that is no parameter
        except (ValueError, TypeError, RuntimeError, OverflowError) as e:
            raise ValueError(f"{path / 'config.json'}: {one_line(e)}") from None
        check_tensors(files, model.disk_parts(), path)
        model = model.to(dtype).to_empty(device=device)
        parts = model.disk_parts()
        if "lm_head.weight" in files and model.lm_head is None:  # a tied model may hold its table twice
            parts["lm_head.weight"] = None
        for name, out in parts.items():
            for rows, part in read_tensor(*files[name]):
                if out is not None:
                    out[rows] = part
                elif not torch.equal(parts["model.embed_tokens.weight"][rows], part.to(device, dtype)):
                    raise ValueError(f"{files[name][0]}: lm_head.weight differs from model.embed_tokens.weight, though "
                                     "config.json ties them (set tie_word_embeddings to false)")
        return model

    def save_pretrained(self, path):
        """Write config.json and model.safetensors, which transformers' LlamaForCausalLM opens."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        save_tensors(self.disk_parts(), path / "model.safetensors")
        write_json(path / "config.json", self.config.to_dict())


# --- files ---

def one_line(error):
    """What an error says, printable and short: it may quote a hostile file."""
    return str(error).encode("unicode_escape").decode()[:300]


def read_json(file):
    """ValueError that names file and place, FileNotFoundError that names the file."""
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{file}: no such file") from None
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
    """{tensor name: (file, name in the file, shape, dtype name)} of a folder's model.safetensors or of its shards."""
    whole, table = path / "model.safetensors", path / "model.safetensors.index.json"
    shards = {None: whole}
    if whole.exists() and table.exists():
        print(f"note: {path}: model.safetensors is read, and the shards of {table.name} are not", file=sys.stderr)
    if not whole.exists():
        if not table.exists():
            raise FileNotFoundError(f"{path}: neither model.safetensors nor {table.name} is there")
        raw = read_json(table)
        weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(s, str) for s in weight_map.values()):
            raise ValueError(f"{table}: key 'weight_map' must map tensor names to file names")
        for shard in weight_map.values():
            # the name comes from a file: it must not lead out of the folder
            if not shard.isprintable() or "/" in shard or "\\" in shard or shard in ("", ".", "..") or len(shard) > 255:
                raise ValueError(f"{table}: shard name {short(shard)} is not a plain file name in this folder")
        shards = {shard: path / shard for shard in sorted(set(weight_map.values()))}
    found = {}
    for shard, file in shards.items():
        for name, (shape, dtype) in tensor_headers(file).items():
            if shard is None or weight_map.get(name) == shard:
                found[name.removeprefix("_orig_mod.")] = file, name, shape, dtype  # a compiled model has the prefix
    if None not in shards:
        lost = [name for name in weight_map if name.removeprefix("_orig_mod.") not in found]
        if lost:
            raise ValueError(f"{shards[weight_map[lost[0]]]}: tensor {short(lost[0])} is not in it, though {table.name} "
                             "says so")
    return found


def tensor_headers(file):
    """{tensor name: (shape, dtype name)}. ValueError where it is no safetensors file."""
    try:
        with safe_open(file, framework="pt") as f:
            parts = {name: f.get_slice(name) for name in f.keys()}
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{file}: not a readable safetensors file ({one_line(e)})") from None


def check_tensors(files, wanted, path):
    """ValueError unless the files hold just the tensors wanted, {name: tensor}, in plain floats."""
    for name, p in wanted.items():
        if name not in files:
            raise ValueError(f"{path}: tensor {name} is missing")
        file, _, shape, dtype = files[name]
        if shape != tuple(p.shape):
            raise ValueError(f"{file}: tensor {name} has shape {short(shape)}, config.json says {tuple(p.shape)}")
        if dtype not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(f"{file}: tensor {name} has dtype {dtype}, not a plain float")
    # a tied checkpoint may hold the output matrix twice, and old ones hold rotary tables
    spare = [n for n in files.keys() - wanted.keys() if n != "lm_head.weight" and "rotary_emb" not in n]
    if spare:
        raise ValueError(f"{files[min(spare)][0]}: tensor {short(min(spare))} is not part of this architecture")


def read_tensor(file, name, shape, dtype):
    """Parts of a tensor, as (rows of it, their numbers). The file is opened anew for each part: its pages count as
    memory of the process for as long as it is open."""
    rows = max(1, 2**24 // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        part = slice(start, start + rows)
        with safe_open(file, framework="pt") as f:
            yield part, f.get_slice(name)[part]
