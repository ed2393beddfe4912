import os
import sys

# The tests run on the CPU. With ATP_GPU=1 only tests/test_gpu.py runs, and sees the GPU.
GPU = os.environ.get("ATP_GPU") == "1"
if not GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks; the commands that tests start inherit it
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share the cores

import pytest  # noqa: E402
import torch  # noqa: E402

TESTS = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(TESTS), os.path.join(TESTS, "tools"), os.path.join(TESTS, "bench")]

from make_task import line  # noqa: E402
from data import load  # noqa: E402


def pytest_ignore_collect(collection_path):
    return True if GPU and collection_path.suffix == ".py" and collection_path.name != "test_gpu.py" else None


# small trained models, for test_train and test_faults

@pytest.fixture(scope="package")
def data(tmp_path_factory):
    """Some built-in questions as a file in GSM8K-Aug's format."""
    file = tmp_path_factory.mktemp("data") / "questions.txt"
    examples = load("in_dist", "test")[:60]
    file.write_text("".join(line(e.question, e.steps, e.answer) for e in examples))
    return str(file)


@pytest.fixture(scope="package")
def vae(tmp_path_factory, data):
    from test_train import command
    from train import main
    out = tmp_path_factory.mktemp("vae")
    main(command(out, data, "--max_iters", "8"))
    return out


@pytest.fixture(scope="package")
def warm(tmp_path_factory, data):
    """Trained until some answers are well formed and some are not: rewards differ within groups."""
    from test_train import command
    from train import main
    out = tmp_path_factory.mktemp("warm")
    main(command(out, data, "--max_iters", "120", "--lr", "1e-2", "--cot_lr", "1e-2"))
    return out


@pytest.fixture(scope="package")
def rl(tmp_path_factory, warm, data):
    from test_train import command
    from train import main
    out = tmp_path_factory.mktemp("rl")
    main(command(out, data, "--init", str(warm), "--max_iters", "3", stage="rl"))
    return out
