"""What `python tests/bench/bench.py --counts` prints: what a CPU can count of the work that a GPU will do.

1. operators dispatched for one latent and one layer, views left out, and kernels of the compiled block
2. graphs that a whole run compiles (vae, rl, closing table), a backend in the place of inductor
3. places where the host would wait for the device: in one supervised step, one rollout, one update. On a CPU
   these are the same operators: .item(), bool(tensor), indexing by a mask, .tolist().
4. bytes kept for the backward pass, an example
"""

import io
import re
import sys
import tempfile
import warnings
from collections import Counter
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import bench
import model as model_module
import train
import vae as vae_module
from make_task import line
from data import load
from model import LLaMA, LLaMAConfig
from train import sft_noise
from vae import collate, to_device

ROOT = str(Path(model_module.__file__).resolve().parent)
BEFORE = {"forward": 36, "backward": 63}  # operators of a latent and layer at commit 1ad6918, counted as here


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


def after_a_question(layers):
    """A LLaMA that has read two questions: it, their last hidden states (2, 1, d), the cache."""
    torch.manual_seed(0)
    llama = LLaMA(LLaMAConfig(64, 32, 48, layers, 4, 2, 8))
    h, cache = llama.read(llama.embed_tokens(torch.arange(10).view(2, 5)), tail=8)
    return llama, h[:, -1:], cache


def chain_operators(layers, latents, backward):
    """Operators of a chain of latents, each the hidden state before it."""
    (llama, h, cache), counts = after_a_question(layers), Operators()
    with counts if not backward else ExitStack():
        for _ in range(latents):
            h = llama.step(h, cache)
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


def norm_operators():
    """Operators of one RMSNorm on a CPU. A GPU has one that does it all."""
    norm, x, counts = torch.nn.RMSNorm(8, 1e-5), torch.ones(2, 8), Operators()
    with counts:
        norm(x)
    return counts.found.total()


def compiled_kernels():
    """Kernels (fused loops, calls of a library) that the compiled block launches at one latent: [forward,
    backward]."""
    from torch._inductor.utils import run_and_get_code
    llama, h, cache = after_a_question(layers=1)
    llama.compile_blocks()
    _, codes = run_and_get_code(lambda: llama.step(h, cache).sum().backward())
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
        if "l_packed_0" in shapes:
            kind.append("padding left out")
        elif x.shape[0] == 1:
            kind.append("one row")
        if "l_wanted" in shapes:
            kind.append("last layer")
        kind.append("gradients" if torch.is_grad_enabled() else "no gradients")
        if not shapes["l_weights_0"].requires_grad:
            kind.append("frozen")
        kinds[", ".join(kind)] += 1
        return graph.forward

    compile_blocks = LLaMA.compile_blocks
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as out, \
            redirect_stdout(io.StringIO()), \
            mock.patch.object(LLaMA, "compile_blocks", lambda self: compile_blocks(self, backend)):
        file = Path(out, "questions.txt")
        examples = load("in_dist", "test")[:200]
        file.write_text("".join(line(e.question, e.steps, e.answer) for e in examples))
        train.main(f"--data {file} --out_dir {out} --compile yes --device cpu --baseline 0 --max_iters 30 "
                   "--rl_iters 3 --eval_size 40 --batch_size 16 --micro_batch 8 --questions_per_step 16 "
                   "--minibatch 64".split())
    torch._dynamo.reset()
    return kinds


# --- synchronisations ---

class Synchronisations(TorchDispatchMode):
    """Counts where Python asks for the contents of a tensor that would be on the GPU, by place in the code.
    On the GPU are: the weights given, and all that is computed with something that is there."""

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
    """Bytes that the forward pass of a supervised micro-batch keeps for backward, beside the weights. Nothing
    is computed: tensors have shapes only."""
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
    with unset_fake_temporarily():  # a batch is made of numbers
        noise = sft_noise(b.run, len(examples), b.spec["K"], 1)
        batch = collate(examples, b.model.config, b.spec["K"], noise)
    with mode, ExitStack() as stack:
        stack.enter_context(mock.patch.object(model_module, "checkpoint", checkpoint))
        # in parts it keeps its gradients, as large as what it is given
        stack.enter_context(mock.patch.object(vae_module, "text_loss", lambda _, h, *more: keep(h).sum()))
        for llama in b.model.llamas():
            llama.activation_checkpointing = repeat
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t))
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        losses = b.model(to_device(batch, b.device))
    weights = {p.untyped_storage()._cdata for p in b.model.parameters()}
    assert losses
    return sum(s.nbytes() for cdata, s in kept.items() if cdata not in weights)


# --- the table ---

def synchronisations(args):
    """{part of the work: Counter of (inside or outside of the loops over latents and tokens, place)}."""
    b = bench.Bench("E", args)
    counts, found = Synchronisations(b.model), {}

    def count(name, work):
        with counts.counting():
            result = work()
        found[name], counts.places = counts.places, Counter()
        return result

    step = bench.supervised(b)
    count("supervised step, 1 micro-batch", lambda: step(1))
    b.to_the_limit()
    b.model.eval()
    questions = [e.question for e in b.batch(1, 16)]
    rollout = count("rollout, 6 latents, 16 tokens", lambda: b.model.rollout(questions, 8, b.noise(128, 1)))
    count("its plans in words", lambda: b.model.plan_texts(rollout.plan.z, rollout.plan.steps, b.tokenizer))
    b.use(train.Run(train.Config(questions_per_step=16, group=8, minibatch=64, device="cpu"), "rl"))
    ddp, optimizer = bench.reinforced(b)
    count("update, 2 minibatches", lambda: bench.full_update(b, ddp, optimizer, rollout, 1))
    return found


def kept_of_1b(args):
    """MB that one more example keeps in Llama-3.2-1B's shape under bfloat16: all of it, and with activation
    checkpointing."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about fake tensors
        b = bench.Bench("1B-train", args)
        examples = b.batch(1, 64)
        return [(kept_bytes(mode, b, examples * 2, repeat) - kept_bytes(mode, b, examples, repeat)) / 64e6
                for repeat in (False, True)]


def report(args):
    """Print the tables."""
    args.device, args.compile = "cpu", "no"
    forward, backward = latent_operators(False), latent_operators(True)
    kernels, eager = compiled_kernels(), sum(forward.values())
    rows = [["eager", BEFORE["forward"], eager, BEFORE["backward"], sum(backward.values())],
            ["eager, RMSNorm as one operator (GPU)", "", eager - 2 * (norm_operators() - 1), "", ""],
            ["kernels, compiled", "", kernels[0], "", kernels[1]]]
    print(bench.markdown(["operators of a latent and layer", "forward, before", "forward", "backward, before",
                          "backward"], rows), end="\n\n", flush=True)
    rows = [[name, sum(n for (where, _), n in places.items() if where == "inside"),
             sum(n for (where, _), n in places.items() if where == "outside"),
             "; ".join(f"{place} {n}" for (_, place), n in places.most_common())]
            for name, places in synchronisations(args).items()]
    print(bench.markdown(["synchronisations", "inside the chain or token loop", "outside", "where"], rows),
          end="\n\n", flush=True)
    rows = [[f"{MB:.0f}" for MB in kept_of_1b(args)]]
    print(bench.markdown(["MB kept an example, 1B shape, bfloat16", "with activation checkpointing"], rows),
          end="\n\n", flush=True)
    kinds = graphs_of_a_run()
    rows = [*kinds.items(), ("all", sum(kinds.values()))]
    print(bench.markdown(["graphs of a whole run", "compiled"], rows))
