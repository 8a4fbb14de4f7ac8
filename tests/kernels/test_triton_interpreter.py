"""Runs the Triton kernels without a GPU. The interpreter must be enabled before Triton is imported, and other tests
import Triton without it, so the cases run in a separate process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiers import slow

pytest.importorskip("triton")
CASES = [
    Path(__file__).with_name(name)
    for name in (
        "triton_cases.py",
        "triton_choice_cases.py",
        "step_cases.py",
        "head_cases.py",
        "delta_cases.py",
        "shadow_cases.py",
    )
]


@pytest.mark.parametrize("tier", ["not slow", *slow("slow")])
def test_cases_under_the_interpreter(tier):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", tier, *map(str, CASES)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, cwd=CASES[0].parents[2], capture_output=True, text=True)
    # pytest exits with a separate error code if it collects nothing
    assert run.returncode == 0 and "skipped" not in run.stdout, run.stdout + run.stderr
