"""LLaMA in one file. Its cache has two segments, as latent reasoning needs them:

    prefix   (Q, KV, S, D)      Q questions of up to S tokens, right-padded, read once
    tail     (Q, KV, G, N, D)   N columns for what follows, in each of the G rows that answer a question

KV heads of D dimensions; row b of the batch B = Q * G is (b // G, b % G). The tail has its size from the
start and a mask says which columns count, so that all latents are one computation on the same shapes.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

SUPPORTED = {  # what this code can run of config.json, the first where the key is missing
    "model_type": ("llama",), "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,),
    "rope_type": ("default", "llama3"), "partial_rotary_factor": (1.0,), "quantization_config": (None,),
    "tie_word_embeddings": (False, True)}


@dataclass
class LLaMAConfig:
    """The part of a Hugging Face LlamaConfig that this code needs."""

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
    rope_scaling: dict | None = None  # or {"rope_type": "llama3", "factor": ...}
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None

    @classmethod
    def from_dict(cls, raw):
        """From a config.json, where transformers 5 has rope_parameters, 4 rope_theta and rope_scaling."""
        raw = {"rms_norm_eps": 1e-6, **{key: values[0] for key, values in SUPPORTED.items()}, **raw}
        rope = {**(raw.get("rope_scaling") or raw.get("rope_parameters") or {})}
        rope.setdefault("rope_type", rope.get("type", "default"))
        raw |= {**rope, "rope_scaling": rope if rope["rope_type"] == "llama3" else None}  # with rope_theta
        for key, values in SUPPORTED.items():
            if raw[key] not in values:
                raise ValueError(f"{key} {raw[key]!r} is not supported (only {values})")
        raw["num_key_value_heads"] = raw.get("num_key_value_heads") or raw["num_attention_heads"]
        raw["head_dim"] = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
        config = cls(**{f.name: raw[f.name] for f in fields(cls) if f.name in raw})
        for name, kind in ((f.name, f.type) for f in fields(cls) if f.type in (int, float)):
            value = getattr(config, name)
            if type(value) not in (int, kind) or not 0 < value <= (2**24 if kind is int else 1e38):
                raise ValueError(f"{name} must be a positive {kind.__name__}, not {value!r}")
            setattr(config, name, kind(value))
        if config.num_hidden_layers >= 500:
            raise ValueError(f"num_hidden_layers {config.num_hidden_layers} is no number of a LLaMA")
        if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads, head_dim even")
        if config.rope_scaling and not 0 < rope["low_freq_factor"] < rope["high_freq_factor"] < math.inf:
            raise ValueError("rope_scaling needs 0 < low_freq_factor < high_freq_factor")
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        if config.eos_token_id is not None and not all(type(i) is int and abs(i) < 2**31 for i in ends):
            raise ValueError(f"eos_token_id must be integers, not {ends}")
        return config


def rope_frequencies(config):
    """Rotation per position of each pair of dimensions (head_dim / 2,)."""
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    freq = config.rope_theta ** -(pairs / config.head_dim)
    if config.rope_scaling is None:
        return freq
    # Llama 3 slows long waves by `factor`, keeps short ones and interpolates between
    keys = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
    factor, low, high, context = (float(config.rope_scaling[key]) for key in keys)
    turns = context * freq / (2 * math.pi)  # within the old context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * freq / factor + smooth * freq


def length_mask(counts, width):
    """Bool mask (B, width) of the first `counts` (B,) columns of each row."""
    return torch.arange(width, device=counts.device) < counts[:, None]


class Padded(NamedTuple):
    """Right-padded rows of token ids."""

    ids: torch.Tensor    # (B, T)
    mask: torch.Tensor   # (B, T) bool: where there is a token
    index: torch.Tensor  # (M,) where the tokens are in the flattened (B * T)

    @classmethod
    def of(cls, rows):
        width = max([1, *map(len, rows)])
        ids = [row + [-1] * (width - len(row)) for row in rows]
        ids = torch.tensor(ids, dtype=torch.long).view(-1, width)
        return cls.masked(ids.clamp(min=0), ids >= 0)

    @classmethod
    def masked(cls, ids, mask):
        return cls(ids, mask, mask.flatten().nonzero()[:, 0])  # on a GPU the CPU waits for their number


# --- attention ---

def product_dtype(x):
    """The dtype of matrix products with x: autocast's where it is on."""
    on = torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if on else x.dtype


class KVCache:
    """prefix: k, v (Q, KV, S, D) of each layer, of which the columns `mask` (Q, S) are tokens. tail: N.
    weights: the matrices of each layer, cast once and not at every latent."""

    def __init__(self, prefix, mask, tail, group, weights):
        self.prefix = [(k.contiguous(), v.contiguous()) for k, v in prefix]
        k = self.prefix[0][0]
        Q, KV, S, D = k.shape
        self.filled = S  # columns written so far
        # it requires a gradient as all later tails do, or torch.compile would specialise the first latent
        empty = partial(k.new_zeros, (Q, KV, group, tail, D), requires_grad=k.requires_grad)
        self.tail = [(empty(), empty()) for _ in prefix]
        self.mask = F.pad(mask.repeat_interleave(group, dim=0), (0, tail))  # (B, S + N)
        self.size, self.group, self.weights = tail, group, weights
        self.graph = self.graph_inputs = self.graph_output = None

    def add_columns(self, mask, dtype):
        """T new columns, tokens where `mask` (B, T) is set. Returns positions (B, T), which columns of the
        tail they are (T,), and attention's bias (Q, 1, G, 1, T, S + N): -inf at what may not be seen."""
        columns = torch.arange(self.mask.shape[1], device=mask.device)
        start, self.filled = self.filled, self.filled + mask.shape[1]
        new = columns[start:self.filled]
        self.mask = self.mask.index_copy(1, new, mask)
        # what is masked uses up no position
        positions = (self.mask.cumsum(dim=1)[:, start:self.filled] - 1).clamp(min=0)
        visible = self.mask[:, None] & (columns <= new[:, None])  # (B, T, S + N)
        bias = torch.where(visible, 0.0, -math.inf).to(dtype).unflatten(0, (-1, self.group))[:, None, :, None]
        return positions, new - (len(columns) - self.size), bias

    def replay(self, f, *inputs):
        """f(*inputs), whose shapes stay. From the second call on it is a CUDA graph, one launch. It replays
        fixed addresses: all that f reads and writes stays where it is."""
        if self.graph_inputs is None:  # the first call compiles and loads kernels, which a capture cannot
            self.graph_inputs = inputs
            return f(*inputs)
        torch._foreach_copy_(self.graph_inputs, inputs)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # NCCL has its own thread
                self.graph_output = f(*self.graph_inputs)
        self.graph.replay()
        return self.graph_output.clone()


def causal_attention(q, k, v, packed):
    """q, k, v (B, T, heads, D), or (1, M, heads, D) packed by (index, B, T) -> y alike, and k, v
    (B, KV, T, D) for a cache."""
    if packed is not None:  # only attention sees padding: all other work is on tokens alone
        index, B, T = packed
        q, k, v = (t.new_zeros(B * T, *t.shape[2:]).index_copy(0, index, t[0]).unflatten(0, (B, T))
                   for t in (q, k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, D)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] > k.shape[1])
    y = y.transpose(1, 2)
    if packed is not None:
        y = y.flatten(0, 1).index_select(0, index)[None]
    return y, k, v


def cached_attention(q, k, v, prefix_k, prefix_v, tail_k, tail_v, columns, bias):
    """T new columns q, k, v (B, T, heads, D) -> y, new tail. Letters: question q, row of its group g, new
    column t, key-value head k, query head r of it, column of prefix s, of tail n."""
    (Q, _, G, N, D), T, KV = tail_k.shape, q.shape[1], k.shape[2]
    k, v = (x.unflatten(0, (Q, G)).permute(0, 3, 1, 2, 4) for x in (k, v))  # (Q, KV, G, T, D)
    # autograd needs every version of the tail
    write = torch.index_copy if torch.is_grad_enabled() else torch.Tensor.index_copy_
    tail_k, tail_v = write(tail_k, 3, columns, k), write(tail_v, 3, columns, v)
    q = q.unflatten(0, (Q, G)).unflatten(3, (KV, -1)) * D**-0.5  # (Q, G, T, KV, R, D)
    # the rows of a group are so many more queries to the one prefix: nothing is expanded
    to_prefix = torch.einsum("qgtkrd,qksd->qkgrts", q, prefix_k)
    to_tail = torch.einsum("qgtkrd,qkgnd->qkgrtn", q, tail_k)
    scores = torch.cat((to_prefix, to_tail), dim=-1) + bias  # (Q, KV, G, R, T, S + N)
    p = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    p_prefix, p_tail = p.split((prefix_k.shape[2], N), dim=-1)
    y = torch.einsum("qkgrts,qksd->qgtkrd", p_prefix, prefix_v)
    y = y + torch.einsum("qkgrtn,qkgnd->qgtkrd", p_tail, tail_v)
    return y.reshape(Q * G, T, -1, D), tail_k, tail_v


class Block(nn.Module):
    """Attention, then SwiGLU."""

    def __init__(self, config):
        super().__init__()
        d, self.width = config.hidden_size, config.intermediate_size
        H, KV, D = self.sizes = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        linear = partial(nn.Linear, bias=False)
        self.input_layernorm = nn.RMSNorm(d, config.rms_norm_eps)
        self.self_attn = nn.ModuleDict({"qkv_proj": linear(d, (H + 2 * KV) * D), "o_proj": linear(H * D, d)})
        self.post_attention_layernorm = nn.RMSNorm(d, config.rms_norm_eps)
        self.mlp = nn.ModuleDict({"gate_up_proj": linear(d, 2 * self.width),
                                  "down_proj": linear(self.width, d)})

    def matrices(self):
        return *self.self_attn.values(), *self.mlp.values()

    def forward(self, x, rope, weights, past=None, packed=None, wanted=None):
        """x (B, T, d) -> x, (k, v). past: (prefix_k, prefix_v, tail_k, tail_v, columns, bias), None in a wide
        pass. Only positions `wanted` (R,), indices into T, are finished and returned."""
        qkv_proj, o_proj, gate_up_proj, down_proj = weights
        q, k, v = self.qkv(x, rope, qkv_proj)
        y, *kv = causal_attention(q, k, v, packed) if past is None else cached_attention(q, k, v, *past)
        if wanted is not None:
            x, y = x.index_select(1, wanted), y.index_select(1, wanted)
        x = x + F.linear(y.flatten(2), o_proj)
        gate_up = F.linear(self.post_attention_layernorm(x), gate_up_proj)
        # chunk(2) is slower when compiled: its width would be a symbol, and loads two bytes wide
        gate, up = gate_up.unflatten(-1, (2, self.width)).unbind(-2)
        return x + F.linear(F.silu(gate) * up, down_proj), tuple(kv)

    def qkv(self, x, rope, weight):
        """x (B, T, d) -> q (B, T, H, D), k and v (B, T, KV, D), q and k rotated."""
        (H, KV, D), (cos, sin) = self.sizes, rope
        qkv = F.linear(self.input_layernorm(x), weight).unflatten(-1, (H + 2 * KV, D))
        qk, v = qkv.split((H + KV, KV), dim=2)
        a, b = qk.chunk(2, dim=-1)  # pairs lie D / 2 apart, as in Hugging Face's files
        qk = qk * cos + torch.cat((-b, a), dim=-1) * sin
        q, k = qk.to(v.dtype).split((H, KV), dim=2)
        return q, k, v


class LLaMA(nn.Module):
    """LLaMA(config) has random weights. model(tokens) gives logits (B, T, vocab)."""

    def __init__(self, config):
        super().__init__()
        self.config, vocab, d = config, config.vocab_size, config.hidden_size
        self.embed_tokens = nn.Embedding(vocab, d)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(d, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(d, vocab, bias=False)
        self.inv_freq = rope_frequencies(config)  # no buffer: model.bfloat16() must not round it
        self.run_block = Block.forward  # called with the layer first; see compile_blocks
        self.activation_checkpointing = self.cuda_graphs = False
        for name, p in self.named_parameters():
            if p.dim() > 1:  # as GPT-2, smaller on residual branches; d**-0.5 is 0.02 at d = 2048
                branch = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=d**-0.5 / math.sqrt(2 * config.num_hidden_layers if branch else 1))
        self.add_tokens()  # none: pads the tables

    def compile_blocks(self, backend="inductor"):
        """Block.forward is compiled unbound: it takes its layer as an argument, so that all share one."""
        torch._dynamo.config.recompile_limit = 64  # there are more kinds of passes than 8
        torch.fx.experimental._config.use_duck_shape = False  # sizes equal once need not stay so
        # in torch 2.13 backward writes over donated buffers of which it still needs views: wrong gradients
        torch._functorch.config.donated_buffer = False
        torch.compiler.config.cache_key_tag = "nothing donated"  # inductor's cache ignores the line above
        torch._dynamo.config.optimize_ddp = False  # or it would cut blocks at DDP's buckets
        self.run_block = torch.compile(Block.forward, dynamic=True, backend=backend)
        self.cuda_graphs = self.output_weight().is_cuda

    def forward(self, tokens):
        return self.logits(self.read(self.embed_tokens(tokens))[0])

    def read(self, embeds, padded=None, wanted=None, tail=0, group=1):
        """A causal pass over embeddings (B, T, d) -> last hidden states (B, T, d) and, if it has a tail to go
        on with, a KVCache of `group` rows a question (else None).

        padded: the Padded that was embedded. Then only its tokens are computed, and the hidden states are
        those (R, d) of the tokens `wanted` (R,), indices into padded.index."""
        B, T = embeds.shape[:2]
        embeds = embeds.to(self.embed_tokens.weight.dtype)
        if padded is None:
            packed, positions = None, torch.arange(T, device=embeds.device)
            mask = torch.ones(B, T, dtype=torch.bool, device=embeds.device)
        else:
            packed, positions, mask = (padded.index, B, T), padded.index % T, padded.mask
            embeds = embeds.flatten(0, 1).index_select(0, padded.index)[None]  # (1, M, d)
        # compiled code would be specialised to a view's base
        x, dtype = embeds.clone(memory_format=torch.contiguous_format), product_dtype(embeds)
        weights = [[module.weight.to(dtype) for module in layer.matrices()] for layer in self.layers]
        rope, run, prefix = self.rope(positions[None], x.dtype), self.block_of_width(T), []
        for i, layer in enumerate(self.layers):
            # the last layer is finished only where its output is read
            ends = wanted if layer is self.layers[-1] else None
            x, kv = run(layer, x, rope, weights[i], None, packed, ends)
            prefix.append(kv)
        x = self.norm(x)
        cache = KVCache(prefix, mask, tail, group, weights) if tail else None
        return x if padded is None else x[0], cache

    def step(self, embeds, cache, mask=None):
        """The next T columns of a cache: embeddings (B, T, d) -> last hidden states (B, T, d). mask (B, T):
        which are tokens (None: all); nobody sees the others."""
        (B, T), dtype = embeds.shape[:2], self.embed_tokens.weight.dtype
        x = embeds.to(dtype).clone(memory_format=torch.contiguous_format)
        mask = torch.ones(B, T, dtype=torch.bool, device=x.device) if mask is None else mask
        positions, *past = cache.add_columns(mask, x.dtype)
        inputs = x, *self.rope(positions, x.dtype), *past
        if self.cuda_graphs and T == 1 and not torch.is_grad_enabled():
            return cache.replay(partial(self.step_layers, cache), *inputs)
        return self.step_layers(cache, *inputs)

    def step_layers(self, cache, x, cos, sin, columns, bias):
        run = self.block_of_width(x.shape[1])
        for i, layer in enumerate(self.layers):
            past = *cache.prefix[i], *cache.tail[i], columns, bias
            x, kv = run(layer, x, (cos, sin), cache.weights[i], past)
            cache.tail[i] = kv
        return self.norm(x)

    def rope(self, positions, dtype):
        """cos, sin (B, T, 1, D) of positions (B, T)."""
        self.inv_freq = self.inv_freq.to(positions.device)
        angles = positions[..., None, None] * self.inv_freq.repeat(2)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def block_of_width(self, T):
        """run_block, with activation checkpointing for wide passes: single positions are slow to repeat."""
        again = self.activation_checkpointing and T > 1 and torch.is_grad_enabled()
        return partial(checkpoint, self.run_block, use_reentrant=False) if again else self.run_block

    def vocab_modules(self):
        """The embedding and, where it is another, the output layer."""
        return [module for module in (self.embed_tokens, self.lm_head) if module is not None]

    def output_weight(self):
        return self.vocab_modules()[-1].weight

    def logits(self, h):
        return F.linear(h, self.output_weight())[..., :self.config.vocab_size]

    @torch.no_grad()
    def add_tokens(self, ids=(), like=None):
        """Rows `ids`, old or new, become copies of row `like` or of the mean row. In memory a table has a
        multiple of 64 rows: GPUs are slow on odd ones."""
        known = self.config.vocab_size
        size = self.config.vocab_size = max([known, *(i + 1 for i in ids)])
        for module in self.vocab_modules():
            w = module.weight[:known]
            row = w.mean(dim=0) if like is None else w[like]
            w = torch.cat((w, row.expand(size - known, -1)))
            module.weight = nn.Parameter(F.pad(w, (0, 0, 0, -size % 64)))
            module.weight[list(ids)] = row

    def disk_parts(self):
        """{name in a Hugging Face file: tensor}. A qkv_proj is three there: q_proj, k_proj, v_proj."""
        (H, KV, D), width, parts = self.layers[0].sizes, self.config.intermediate_size, {}
        split = {"qkv_proj": dict(q_proj=H * D, k_proj=KV * D, v_proj=KV * D),
                 "gate_up_proj": dict(gate_proj=width, up_proj=width)}
        for name, p in self.named_parameters():
            ours, start = name.split(".")[-2], "" if name == "lm_head.weight" else "model."
            p = p[:self.config.vocab_size] if ours in ("embed_tokens", "lm_head") else p
            theirs = split.get(ours, {ours: len(p)})
            for part, rows in zip(theirs, p.detach().split(list(theirs.values()))):
                parts[start + name.replace(ours, part)] = rows
        return parts

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Read config.json and model.safetensors or its shards, a tensor at a time."""
        raw, found = read_json(f"{path}/config.json"), tensor_files(Path(path))
        try:
            config = LLaMAConfig.from_dict(raw)
            with torch.device("meta"):
                model = cls(config)
        except (ValueError, TypeError, KeyError, ArithmeticError, RuntimeError) as e:
            raise ValueError(f"{path}/config.json: {one_line(e)}") from None
        if not any(name.startswith("model.") for name in found):  # saved from inside LlamaForCausalLM
            found = {name if name == "lm_head.weight" else f"model.{name}": v for name, v in found.items()}
        # a tied model's file may hold the embedding by either name, or by both
        output = found.pop("lm_head.weight", None) if config.tie_word_embeddings else None
        if output:
            found.setdefault("model.embed_tokens.weight", output)
        check_tensors(found, model.disk_parts(), path)
        model = model.to(dtype).to_empty(device=device)
        for module in model.vocab_modules():
            module.weight.data[config.vocab_size:] = 0
        for name, out in model.disk_parts().items():
            out.copy_(read_tensor(found[name]))
        table = model.embed_tokens.weight[:config.vocab_size]
        if output and not torch.equal(read_tensor(output).to(table), table):
            raise ValueError(f"{path}: lm_head.weight is not the embedding, to which config.json ties it")
        return model

    def save_pretrained(self, path):
        os.makedirs(path, exist_ok=True)
        save_tensors(self.disk_parts(), f"{path}/model.safetensors")
        kind = dict(architectures=["LlamaForCausalLM"], model_type="llama")
        write_json(f"{path}/config.json", kind | asdict(self.config))


def one_line(text):
    """Printable and short, since it may quote a hostile file."""
    return repr(str(text))[1:-1][:300]


def read_json(file):
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file}: not valid JSON ({one_line(e)})") from None


def write_json(file, value):
    with open(file, "w", encoding="utf-8") as f:
        f.write(json.dumps(value, indent=2) + "\n")
        f.flush()
        os.fsync(f.fileno())


def save_tensors(tensors, file):
    """Write {name: tensor}; a full disk is an OSError."""
    try:
        save_file({n: t.contiguous() for n, t in tensors.items()}, file, metadata={"format": "pt"})
    except SafetensorError as e:
        raise OSError(f"{file}: {e}") from None
    with open(file, "rb+") as f:
        os.fsync(f.fileno())


def tensor_files(path):
    """tensor_headers of model.safetensors or else of its shards."""
    files, index = [path / "model.safetensors"], path / "model.safetensors.index.json"
    if index.exists() and not files[0].exists():
        try:  # only files in this folder, whatever the index says
            files = {path / one_line(Path(name).name) for name in read_json(index)["weight_map"].values()}
        except (TypeError, KeyError, AttributeError):
            raise ValueError(f"{index}: weight_map must map tensor names to file names") from None
    return {name: place for file in files for name, place in tensor_headers(file).items()}


def tensor_headers(file):
    """{tensor name without torch.compile's prefix: (file, name there, shape, dtype name)}"""
    try:
        with safe_open(file, framework="pt") as f:
            parts = {name: f.get_slice(name) for name in f.keys()}
            return {name.removeprefix("_orig_mod."): (file, name, part.get_shape(), part.get_dtype())
                    for name, part in parts.items()}
    except (SafetensorError, OSError) as e:
        opened = isinstance(e, SafetensorError) and file.is_file()
        pointer = opened and open(file, "rb").read(24) == b"version https://git-lfs."
        why = "a Git LFS pointer: `git lfs pull` fetches the file" if pointer else one_line(e)
        raise ValueError(f"{file}: not a readable safetensors file ({why})") from None


def read_tensor(entry):
    """The tensor of an entry of tensor_headers."""
    file, name, _, _ = entry
    with safe_open(file, framework="pt") as f:  # until it is closed, what was read is in memory
        return f.get_tensor(name)


def check_tensors(found, wanted, path):
    """Unless tensor_headers found just what is wanted, {name: tensor}, in plain floats: ValueError."""
    for name in sorted({n for n in found if "rotary_emb" not in n} ^ wanted.keys()):  # old files hold those
        raise ValueError(f"{path}: tensor {one_line(name)} is missing or does not belong there")
    for name, p in wanted.items():
        file, _, shape, dtype = found[name]
        if shape != list(p.shape) or dtype not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(f"{file}: {name} must be floats {list(p.shape)}, not {dtype} {one_line(shape)}")
