import os
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
torch.set_num_threads(2)

import model  # noqa: E402


@pytest.fixture(autouse=True)
def pack_small_batches(request, monkeypatch):
    """Padding is left out, and attention cut into parts, in the small batches of tests too; not where runs in this
    process are compared with runs in others."""
    if request.module.__name__ != "test_train":
        monkeypatch.setattr(model, "WORTH", 1)
        monkeypatch.setattr(model, "PART", 8)
