import os
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
torch.set_num_threads(2)

import model  # noqa: E402
import train  # noqa: E402
from data import builtin  # noqa: E402


@pytest.fixture(autouse=True)
def pack_small_batches(request, monkeypatch):
    """Padding is left out, and attention cut into parts, in the small batches of tests too; not where runs in this
    process are compared with runs in others."""
    if request.module.__name__ not in ("test_train", "test_faults"):
        monkeypatch.setattr(model, "WORTH", 1)
        monkeypatch.setattr(model, "PART", 8)


# small trained models, for test_train and test_faults

@pytest.fixture(scope="package")
def data(tmp_path_factory):
    """Some built-in questions as a file in GSM8K-Aug's format."""
    file = tmp_path_factory.mktemp("data") / "questions.txt"
    file.write_text("".join(f"{e.question}||{' '.join(e.steps)} #### {e.answer}\n" for e in builtin("in_dist", "test")[:60]))
    return str(file)


@pytest.fixture(scope="package")
def vae(tmp_path_factory, data):
    from test_train import command
    out = tmp_path_factory.mktemp("vae")
    train.main(command(out, data, "--max_iters", "8"))
    return out


@pytest.fixture(scope="package")
def warm(tmp_path_factory, data):
    """Trained until some answers are well formed and some are not: rewards differ within groups."""
    from test_train import command
    out = tmp_path_factory.mktemp("warm")
    train.main(command(out, data, "--max_iters", "120", "--lr", "1e-2", "--cot_lr", "1e-2"))
    return out


@pytest.fixture(scope="package")
def rl(tmp_path_factory, warm, data):
    from test_train import command
    out = tmp_path_factory.mktemp("rl")
    train.main(command(out, data, "--init", str(warm), "--max_iters", "3", stage="rl"))
    return out
