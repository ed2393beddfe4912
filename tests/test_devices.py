"""What a step computes lies on the model's device. The meta device stands for a GPU here: it knows shapes alone, so
where the code asks for a value it is given a one."""

from contextlib import nullcontext

import naive
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
import train
import vae
from rl import LogProbs, rl_step
from vae import Padded, collate, moved

META = torch.device("meta")
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class OneDevice(TorchDispatchMode):
    """Refuses an operator whose tensors, single numbers apart, lie on two devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        devices = {x.device.type for x in tree_leaves((args, kwargs)) if torch.is_tensor(x) and x.dim()}
        assert func in MOVES or len(devices) < 2, f"{func} of tensors on {devices}"
        return func(*args, **kwargs or {})


@pytest.fixture
def meta(monkeypatch):
    """Makes the meta device answer where a GPU would."""
    def answers(name, of_meta):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x: of_meta(x) if x.is_meta else own(x))

    def masked(cls, ids, valid):
        places = torch.arange(ids.numel(), device=META) if ids.is_meta else valid.flatten().nonzero()[:, 0]
        return cls(ids, valid, places)

    answers("__bool__", lambda x: True)
    answers("__float__", lambda x: 1.0)
    answers("tolist", lambda x: torch.ones(x.shape, dtype=torch.long).tolist())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(Padded, "masked", classmethod(masked))
    for module in (model, vae):
        monkeypatch.setattr(module, "product_dtype", lambda x: x.dtype)
    monkeypatch.setitem(vae.MAX_DECODED, "meta", 4)
    monkeypatch.setitem(vae.MAX_LOGITS, "meta", 43 * 3)


class Words:
    def decode(self, ids):
        return "### 1"


@pytest.mark.parametrize("method", ("atp", "nocot"))
def test_nothing_stays_on_the_cpu(method, meta):
    net, rows = naive.tiny(method), naive.examples(2)
    batch = collate(rows, net.config, 3, torch.randn(2, 3, 2, 16))
    cfg = train.Config(questions_per_step=2, group=2, minibatch=2, micro_batch=2, max_answer=2, w_acc=0.0)
    run = train.Run(cfg, "rl")
    run.device, run.autocast = META, nullcontext
    net.to(META)
    for llama in net.llamas():
        llama.activation_checkpointing = True
    with OneDevice():
        losses = net(moved(batch, META))
        sum(losses.values()).backward()
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        for latent_grad in ("score", "path"):
            log_probs, reference = (LogProbs(net, latent_grad) for _ in range(2))
            stats = rl_step(run, log_probs, reference, sgd, rows, Words(), 0)
            assert "kl" in stats  # it made its update
    assert {value.device.type for value in losses.values()} == {"meta"}


def test_a_tensor_on_the_cpu_is_refused():
    with OneDevice(), pytest.raises(AssertionError, match="index_select"):
        torch.ones(3, device=META).index_select(0, torch.tensor([0]))
