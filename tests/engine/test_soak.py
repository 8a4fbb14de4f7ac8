"""Random batches over everything that is registered, under hardly any memory, with aborts and cache resets.

The generator and what is checked after each batch are those of `python -m tests.soak`. It runs in a process of
its own with one thread: engines that die there harm no other test.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import GOLDEN

ROOT = GOLDEN.parent.parent


def soak(folder: Path, *arguments: str, seconds: float = 600) -> dict:
    ours = ("VLLM_LOGGING_LEVEL",)
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", "--folder", str(folder), *arguments],
        cwd=ROOT,
        timeout=seconds,
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name not in ours},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    (report,) = folder.glob("soak-*.json")
    return json.loads(report.read_text())


@pytest.mark.slow
def test_soak(tmp_path):
    report = soak(tmp_path, "--requests", "72", "--shift", "12", "--seed", "11")
    total = report["settings"]["in_all"]
    assert total["requests"] == 72 and total["compared"] >= 40
    assert total["aborted"] > 0 and total["restarted"] > 0
    assert len({row["checkpoint"] for row in report["rows"]}) >= 4


@pytest.mark.slow
def test_requests_that_reach_the_models_length():
    """Of block-causal models, whose canvas ends at a multiple of the block; the length is none."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", "--at-the-limit", "--requests", "48"],
        cwd=ROOT,
        timeout=600,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert done.stdout.count("24 requests") == 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_soak(tmp_path, dtype):
    """As long as it fits into `make test-slow`; `python -m tests.soak --requests 3000` goes on for longer."""
    total = soak(tmp_path, "--requests", "150", "--seed", "12", "--dtype", dtype, seconds=1800)["settings"]["in_all"]
    assert total["requests"] == 150 and total["compared"] >= 100
