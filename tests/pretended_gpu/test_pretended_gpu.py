"""A process that pretends to have a GPU cannot be this one, which has asked vLLM for its platform."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
def test_on_a_pretended_gpu():
    command = [sys.executable, "-m", "tests.pretended_gpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
