"""What `python tests/bench.py --counts` prints: what can be counted on a CPU of the work that a GPU will do.

1. operators dispatched for one latent and one layer, views left out, and kernels of the compiled block
2. graphs that a whole run compiles (vae, rl, closing table)
3. places where the host would wait for the device: in one supervised step, one rollout, one update
4. bytes kept for the backward pass, an example
"""

import re
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import model as model_module
import train
import vae as vae_module
from model import Block, KVCache, LLaMA, LLaMAConfig
from train import micro_batches
from vae import moved

ROOT = str(Path(model_module.__file__).resolve().parent)


# --- operators ---

class Operators(TorchDispatchMode):
    """Counts operators that compute: no views and no aliases."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.overloadpacket.__name__ not in ("_unsafe_view", "promote_types"):
            self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def chain_operators(layers, latents, backward):
    """Operators of a chain of latents, each the hidden state before it."""
    torch.manual_seed(0)
    llama = LLaMA(LLaMAConfig(64, 32, 48, layers, 4, 2, 8))
    counts, cache = Operators(), KVCache(8)
    h = llama.hidden(torch.arange(10).view(2, 5), cache=cache)[:, -1]
    with counts if not backward else ExitStack():
        for _ in range(latents):
            h = llama.hidden(embeds=h[:, None], cache=cache)[:, 0]
    if backward:
        with counts:
            h.sum().backward()
    return counts.found


def latent_operators(backward):
    """Operators of one more latent and one more layer: what neither alone brings."""
    of = lambda layers, latents: chain_operators(layers, latents, backward)
    total = Counter()
    for found, sign in ((of(2, 4), 1), (of(2, 3), -1), (of(1, 4), -1), (of(1, 3), 1)):
        for name, n in found.items():
            total[name] += sign * n
    return Counter({name: n for name, n in total.items() if n})


def compiled_kernels():
    """Kernels (fused loops, calls of a library) that the compiled block launches at one latent: forward, backward."""
    from torch._inductor.utils import run_and_get_code
    torch.manual_seed(0)
    llama = LLaMA(LLaMAConfig(64, 32, 48, 1, 4, 2, 8))
    cache = KVCache(8)
    h = llama.hidden(torch.arange(10).view(2, 5), cache=cache)[:, -1]
    llama.compile_blocks()
    _, codes = run_and_get_code(lambda: llama.hidden(embeds=h[:, None], cache=cache).sum().backward())
    launches = lambda code: len(re.findall(r"extern_kernels\.|^ +cpp_fused\w+\(|\.run\(", code, flags=re.M))
    return [launches(code) for code in codes]


# --- graphs ---

def graphs_of_a_run():
    """{kind of pass: graphs compiled for it} over a short run of all stages in one process."""
    kinds = Counter()

    def backend(graph, inputs):
        shapes = {}
        for node, value in zip((n for n in graph.graph.nodes if n.op == "placeholder"), inputs):
            shapes[node.name.strip("_")] = value
        x, tail = shapes["l_x"], shapes.get("l_past_2")
        kind = ["one position" if x.shape[1] == 1 else "wide", "causal" if tail is None else "over a tail"]
        if tail is not None and tail.shape[2] > 1:
            kind.append("groups")
        if x.shape[0] == 1:
            kind.append("one row")
        kind.append("gradients" if torch.is_grad_enabled() else "no gradients")
        if not shapes["l_weights_0"].requires_grad:
            kind.append("frozen")
        kinds[", ".join(kind)] += 1
        return graph.forward

    compile_blocks = LLaMA.compile_blocks
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as out, \
            mock.patch.object(LLaMA, "compile_blocks", lambda self: compile_blocks(self, backend)):
        train.main(f"--out_dir {out} --compile yes --device cpu --baseline 0 --max_iters 30 --rl_iters 3 "
                   "--eval_size 40 --batch_size 16 --micro_batch 8 --questions_per_step 16 --minibatch 64".split())
    torch._dynamo.reset()
    return kinds


# --- synchronisations ---

class Synchronisations(TorchDispatchMode):
    """Counts where Python asks for the contents of a tensor that would be on the GPU, by place in the code. On the
    GPU are: the weights given, and all that is computed with something that is there."""

    ASK = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2")

    def __init__(self, module):
        super().__init__()
        self.there, self.places = WeakIdKeyDictionary(), Counter()
        for t in (*module.parameters(), *module.buffers()):
            self.there[t] = True

    def on_gpu(self, values):
        return any(torch.is_tensor(v) and v in self.there for v in tree_leaves(values))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if self.on_gpu((args, kwargs)):
            masks = name in ("index", "index_put", "index_put_") and \
                any(torch.is_tensor(i) and i.dtype == torch.bool for i in args[1])
            if name in self.ASK or masks:
                self.seen()
            out = func(*args, **(kwargs or {}))
            for t in tree_leaves(out):
                if torch.is_tensor(t):
                    self.there[t] = True
            return out
        return func(*args, **(kwargs or {}))

    def seen(self):
        frame, inside, place = sys._getframe(1), False, None
        while frame:
            code = frame.f_code
            if place is None and code.co_filename.startswith(ROOT) and "tests" not in code.co_filename:
                place = f"{Path(code.co_filename).name}, {code.co_qualname}"
            inside |= code.co_name in ("think", "generate")
            frame = frame.f_back
        self.places["inside" if inside else "outside", place] += 1

    @contextmanager
    def counting(self):
        """tolist() reads memory without an operator."""
        tolist = torch.Tensor.tolist

        def asked(tensor):
            if tensor in self.there:
                self.seen()
            return tolist(tensor)

        with mock.patch.object(torch.Tensor, "tolist", asked), self:
            yield self


# --- memory ---

def kept_bytes(mode, b, examples, repeat):
    """Bytes that the forward pass of a supervised micro-batch keeps for backward, beside the weights. Nothing is
    computed: tensors have shapes only."""
    kept = {}

    def keep(t):
        storage = t.untyped_storage()
        kept[storage._cdata] = storage
        return t

    def checkpoint(f, *args, **more):  # what a repeated pass keeps is what it is given
        for t in tree_leaves(args):
            if torch.is_tensor(t):
                keep(t)
        return real(f, *args, **more)

    real = model_module.checkpoint
    b.run.micro_batch = len(examples)
    batch = next(micro_batches(b.run, examples, b.spec["K"], 1))
    with mode, ExitStack() as stack:
        for module in (model_module, vae_module):
            stack.enter_context(mock.patch.object(module, "checkpoint", checkpoint))
        for llama in b.model.llamas():
            llama.activation_checkpointing = repeat
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t))
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        losses = b.model(moved(batch, b.device))
    weights = {p.untyped_storage()._cdata for p in b.model.parameters()}
    assert losses
    return sum(s.nbytes() for cdata, s in kept.items() if cdata not in weights)
