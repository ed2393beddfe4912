"""The benches run, and what they count on a CPU stays what it is."""

import itertools
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench
import counts

ARGS = SimpleNamespace(device="cpu", compile="no", smollm2="", data_dir="data")


def test_the_gpu_workload_runs_on_a_cpu():
    flags = "--workloads 1B-train --tiny --device cpu --compile no --seconds 0.1 --micro 8 4 --threads 1"
    command = [sys.executable, str(Path(bench.__file__)), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr
    rows = {line.split(" | ")[0].strip("| ") for line in done.stdout.splitlines() if line.startswith("|")}
    assert rows >= {"micro-batch 8", "micro-batch 4", "score, minibatch 2", "path, minibatch 16", "batch 256"}


def test_the_time_given_decides_no_measurement(monkeypatch, capsys):
    """On a busy machine the first product can take longer than the time for all."""
    assert 0 < bench.matmul_peak(torch.device("cpu"), seconds=0) < math.inf
    clock = itertools.count(0, 1000)  # each look at the clock is 1,000 s later
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    assert bench.matmul_peak(torch.device("cpu"), seconds=0.5) > 0
    assert bench.rounds(lambda step: step, seconds=0.5, least=3) == [1, 2, 3, 4]
    with pytest.raises(SystemExit):
        bench.arguments(["--micro", "0"])
    assert "0 must be 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("measure", (bench.sft, bench.rl))
def test_a_cpu_workload_runs(measure, monkeypatch):
    monkeypatch.setitem(bench.WORKLOADS, "E", bench.WORKLOADS["E"] | dict(batch=8, questions=4))
    found = measure("E", ARGS, 0.0)
    assert found["memory_gb"] > 0 and found.get("examples_s", found.get("rollouts_s")) > 0


def test_operators_of_a_latent():
    """At most those of commit 1ad6918 forward, and 26 where RMSNorm is one operator."""
    forward = counts.latent_operators(False).total()
    assert forward <= counts.BEFORE["forward"] and forward - 2 * (counts.norm_operators() - 1) <= 26


def test_nothing_waits_for_the_device_in_a_chain():
    """But for whether all rows have ended, once a latent step and once a token of a rollout."""
    inside = {name: sum(n for (where, _), n in places.items() if where == "inside")
              for name, places in counts.synchronisations(ARGS).items()}
    assert inside.pop("rollout, 6 latents, 16 tokens") <= 6 + 15
    assert inside.pop("its plans in words") <= 2 * 15
    assert set(inside.values()) == {0}


def test_a_run_compiles_one_graph_a_kind():
    """Only a prefix of one position, where a decoder reads one latent, has a second one."""
    kinds = counts.graphs_of_a_run()
    assert {kind for kind, n in kinds.items() if n > 1} == {"one position, over a tail, no gradients"}
    for part in ("padding left out", "last layer"):  # or counts.py looks for an argument of another name
        assert any(part in kind for kind in kinds), part
    assert kinds.total() <= 13
