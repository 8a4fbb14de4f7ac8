"""The kernel benchmark end to end on a short context, and without an installed package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import kernel_cases, kernels

ROOT = Path(__file__).resolve().parents[2]


def test_a_quick_run(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "kernels", "--quick", "--results", str(tmp_path)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    data = json.loads((tmp_path / "kernels-cpu.json").read_text())
    (row,) = data["rows"]
    assert row["keys"] == 2048 and "vLLM CPU attention" in row["dense"]
    assert any("36 cases compared" in note for note in data["notes"])


def test_ratios_are_to_the_fastest_dense_kernel(monkeypatch):
    """Two of torch's and vLLM's take 8, 6 and 4 ms; all three steps 2, with vLLM's kernel 1; then each step alone."""
    times = iter([8.0, 6.0, 4.0, 2.0, 1.0, 0.5, 0.25, 1.25, 0.125])
    monkeypatch.setattr(kernels, "timed", lambda function, device, seconds: next(times))
    row = kernels.measure(kernels.Case.random(256, 1, 1, "cpu"), 0.0, 1e9)
    assert (row["dense_kernel"], row["dense_ms"]) == ("vLLM CPU attention", 4.0)
    assert (row["ratio"], row["served_ratio"], row["attend_ms"], row["store_us"]) == (2.0, 4.0, 1.25, 125.0)


def test_it_needs_nothing_but_torch():
    """From a checkout that is not installed, where importing vLLM fails."""
    code = (
        "import sys; sys.modules['vllm'] = None; sys.path = [p for p in sys.path if 'editable' not in p]\n"
        "sys.meta_path = [f for f in sys.meta_path if 'ditable' not in getattr(f, '__name__', '')]\n"
        "import torch; from benchmarks import dense_kernels, kernels\n"
        "assert kernels.check(torch.device('cpu')) == 36\n"
        "assert dense_kernels.vllm_cpu_kernel(kernels.Case.random(256, 1, 1, 'cpu'), None) is None\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_checks_can_fail(monkeypatch):
    monkeypatch.setattr(
        kernel_cases, "top_pages", lambda scores, k: torch.zeros(*scores.shape[:2], k, dtype=torch.int32)
    )
    with pytest.raises(AssertionError):
        kernels.check(torch.device("cpu"))
