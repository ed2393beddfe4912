"""Two things of a GPU, where there is none. What a step computes lies on the model's device: the meta device stands for
a GPU here; it knows shapes alone, so where the code asks for a value it is given a one. And a position that is replayed as
a CUDA graph: operators that are recorded stand for it."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import oracle
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
import train
import vae
from rl import LogProbs, rl_step
from model import Padded
from vae import Noise, collate, to_device

META = torch.device("meta")
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


def tensors(tree):
    return [x for x in tree_leaves(tree) if torch.is_tensor(x)]


class OneDevice(TorchDispatchMode):
    """Refuses an operator whose tensors, single numbers apart, lie on two devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        devices = {x.device.type for x in tensors((args, kwargs)) if x.dim()}
        assert func in MOVES or len(devices) < 2, f"{func} of tensors on {devices}"
        return func(*args, **kwargs or {})


@pytest.fixture
def meta(monkeypatch):
    """Makes the meta device answer where a GPU would."""
    def answers(name, of_meta):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x: of_meta(x) if x.is_meta else own(x))

    def masked(cls, ids, mask):
        index = torch.arange(ids.numel(), device=META) if ids.is_meta else mask.flatten().nonzero()[:, 0]
        return cls(ids, mask, index)

    answers("__bool__", lambda x: True)
    answers("__float__", lambda x: 1.0)
    answers("tolist", lambda x: torch.ones(x.shape, dtype=torch.long).tolist())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(Padded, "masked", classmethod(masked))
    for module in (model, vae):
        monkeypatch.setattr(module, "product_dtype", lambda x: x.dtype)
    monkeypatch.setitem(vae.MAX_DECODED, "meta", 4)
    monkeypatch.setitem(vae.MAX_LOGITS, "meta", 43 * 3)


class Graph(TorchDispatchMode):
    """torch.cuda.CUDAGraph and torch.cuda.graph: what runs under it is recorded but not done, and replay does it, from the
    same memory into the same memory."""

    made = []

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0
        self.made.append(self)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = [(x, x.clone()) for x in tensors(args)]
        out = func(*args, **kwargs or {})
        for x, value in before:
            x.copy_(value)
        memory = {x.untyped_storage().data_ptr() for x, _ in before}
        for x in tensors(out):
            if x.untyped_storage().data_ptr() not in memory:  # neither a view nor in place: not known yet
                x.fill_(math.nan if x.is_floating_point() else 0)
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            for x, value in zip(tensors(out), tensors(func(*args, **kwargs))):
                x.copy_(value)



@pytest.mark.parametrize("method", ("atp", "nocot"))
def test_nothing_stays_on_the_cpu(method, meta):
    net, rows = oracle.tiny(method), oracle.examples(2)
    batch = collate(rows, net.config, 3, torch.randn(2, 3, 2, 16))
    cfg = train.Config(questions_per_step=2, group=2, minibatch=2, micro_batch=2, max_answer=2, w_acc=0.0)
    run = train.Run(cfg, "rl")
    run.device, run.autocast = META, nullcontext
    run.model, run.tokenizer = net, SimpleNamespace(decode=lambda ids: "### 1")
    net.to(META)
    for llama in net.llamas():
        llama.activation_checkpointing = True
    with OneDevice():
        losses = net(to_device(batch, META))
        sum(losses.values()).backward()
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        for latent_grad in ("score", "path"):
            log_probs, reference = (LogProbs(net, latent_grad) for _ in range(2))
            stats = rl_step(run, log_probs, reference, sgd, rows)
            assert "kl" in stats  # it made its update
    assert {value.device.type for value in losses.values()} == {"meta"}


def test_a_tensor_on_the_cpu_is_refused():
    with OneDevice(), pytest.raises(AssertionError, match="index_select"):
        torch.ones(3, device=META).index_select(0, torch.tensor([0]))


@pytest.mark.parametrize("method, temperature", (("atp", 0.0), ("atp", 1.0), ("simcot", 1.0)))
def test_positions_replayed_as_cuda_graphs_equal_eager_ones(method, temperature, monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: graph)
    monkeypatch.setattr(Graph, "made", [])
    net, questions = oracle.tiny(method, K=4, seed=3), [e.question for e in oracle.examples(8)]
    noise = Noise.draw(24, net.config, 16, 8, torch.Generator().manual_seed(1))
    found = []
    for graphs in (False, True):
        for llama in net.llamas():
            llama.cuda_graphs = graphs
        rollout = net.rollout(questions, 3, noise, 8, temperature)
        words = net.plan_texts(rollout.plan.z, rollout.plan.steps, SimpleNamespace(decode=str))
        with torch.no_grad():  # single positions, then a wide pass
            found.append((rollout, words, LogProbs(net, "path")(rollout)))
    for one, other in zip(*map(tree_leaves, found), strict=True):
        assert torch.equal(one, other) if torch.is_tensor(one) else one == other
    assert len(set(sum(words, []))) > 3
    assert len(Graph.made) == 3  # of rollout, decoder, log-probabilities
    assert min(graph.replays for graph in Graph.made) > 3
    assert method == "simcot" or len(set(rollout.plan.steps.tolist())) > 2  # some rows end earlier
    LogProbs(net, "path")(rollout)  # with gradients
    assert len(Graph.made) == 3
