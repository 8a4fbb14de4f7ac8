"""The Triton path without a GPU: with the interpreter in a separate process, and compiled ahead of time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
from tests.kernels.test_triton_compile import (  # noqa: E402
    TARGETS,
    TIERED_TARGETS,
    launches,
    resources,
    source,
    triton_cache,
)
from tests.tiers import slow  # noqa: E402

__all__ = ["launches", "triton_cache"]  # fixtures

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("tier", ["not slow", *slow("slow")])
def test_cases_under_the_interpreter(tier):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        tier,
        "tests/training/triton_cases.py",
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "skipped" not in run.stdout, run.stdout + run.stderr


def launch(dim=128, group=4, page_size=64, dtype=torch.bfloat16, causal=True, hard=False):
    from vllm_dlm.kernels.soft_page_attention import Gate
    from vllm_dlm.kernels.soft_page_attention.gate import Rows
    from vllm_dlm.kernels.soft_page_attention.triton import backward, forward

    def meta(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    gate = Gate(page_size, 32, causal=causal, temperature=0.0 if hard else 1.0)
    q, k, rows = meta(1, 8, group, 512, dim), meta(1, 8, 16384, dim), Rows(8192, 8704, together=not causal)
    log_mask = meta(1, 8, 512 if causal else 1, 256, dtype=torch.float32)
    out, lse = forward(q, k, k, log_mask, gate, 0.1, rows)
    backward(q, k, k, log_mask, out, lse, out, gate, 0.1, rows)


CASES = {
    "causal": {},
    "hard": {"hard": True},
    "a response": {"causal": False, "group": 1, "page_size": 32},
    "wide heads": {"dim": 256},
    "narrow heads": {"dim": 64, "group": 7},
    "float32": {"dtype": torch.float32, "dim": 64},
}


@pytest.mark.parametrize("target", TIERED_TARGETS)
@pytest.mark.parametrize("case", ["causal", *slow(*(name for name in CASES if name != "causal"))])
def test_compiles_without_spills(case, target, launches):
    launch(**CASES[case])
    gpu, memory = TARGETS[target]
    assert len(launches) == 3
    for kernel, arguments, options in launches:
        compiled = triton.compile(source(kernel, arguments), target=gpu, options=options)
        registers, spills = resources(compiled, gpu)
        line = f"{kernel.__name__}: {registers} registers, {spills} spilled, {compiled.metadata.shared} bytes shared"
        print(target, case, options, line)
        assert registers <= (512 if gpu.backend == "hip" else 255) and spills == 0, line
        assert compiled.metadata.shared <= memory, line
