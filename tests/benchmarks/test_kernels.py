"""The kernel benchmark, without an engine and without an installed package."""

import subprocess
import sys

import pytest
import torch

from benchmarks.lib import kernel_cases
from benchmarks.lib.kernel_case import KernelCase
from benchmarks.lib.page_cases import PageCase
from benchmarks.lib.report import ROOT
from benchmarks.suites import correctness, kernels


def test_ratios_are_to_the_fastest_dense_kernel(monkeypatch):
    """Two of torch's and vLLM's take 8, 6 and 4 ms; all three steps 2, with vLLM's kernel 1; then each step alone."""
    times = iter([8.0, 6.0, 4.0, 2.0, 1.0, 0.5, 0.25, 1.25, 0.125])
    monkeypatch.setattr(kernels, "call_ms", lambda function, here, seconds: next(times))
    row = kernels.measured(PageCase.random(256, 1, 1, "cpu"), 0.0, 1e9)
    assert (row["dense_kernel"], row["dense_ms"]) == ("vLLM CPU attention", 4.0)
    assert (row["ratio"], row["served_ratio"], row["attend_ms"], row["store_us"]) == (2.0, 4.0, 1.25, 125.0)


def test_it_needs_nothing_but_torch():
    """From a checkout that is not installed, where importing vLLM fails."""
    code = (
        "import sys; sys.modules['vllm'] = None; sys.path = [p for p in sys.path if 'editable' not in p]\n"
        "sys.meta_path = [f for f in sys.meta_path if 'ditable' not in getattr(f, '__name__', '')]\n"
        "from benchmarks.lib import dense_kernels, page_cases, runner, suite\n"
        "from benchmarks.suites.correctness import Kernel, kernel\n"
        "for name in ('page_scores', 'top_pages', 'sparse_attention'):\n"
        "    row = kernel(Kernel(name)); assert row['right'] == row['cases'] > 0, row\n"
        "assert dense_kernels.vllm_cpu_kernel(page_cases.PageCase.random(256, 1, 1, 'cpu'), None) is None\n"
        "assert suite.planned('kernels', suite.parser().parse_args(['kernels'])).parts\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_checks_can_fail(monkeypatch):
    from vllm_dlm.kernels import top_pages

    zeros = lambda scores, k: torch.zeros(*scores.shape[:2], k, dtype=torch.int32)  # noqa: E731
    monkeypatch.setattr(top_pages, "top_pages", zeros)
    assert correctness.kernel(correctness.Kernel("top_pages"))["right"] < 6


def test_every_kernel_has_cases():
    assert set(kernel_cases.folders()) <= set(kernel_cases.CASES)


def test_errors_are_shares_of_the_tolerance():
    def error(got, want, tolerance):
        return correctness.error_of(KernelCase("", torch.tensor(got), torch.tensor(want), tolerance))

    assert error([1.0, 3.1], [1.0, 3.0], 0.1) == pytest.approx(0.25)
    assert error([float("nan"), -torch.inf], [float("nan"), -torch.inf], 0.1) == 0
    assert error([float("nan")], [1.0], 0.1) == torch.inf
    assert error([1, 2], [1, 2], 0) == 0 and error([1, 2], [1, 3], 0) == torch.inf
    assert error([1.0], [[1.0, 1.0]], 0.1) == torch.inf
