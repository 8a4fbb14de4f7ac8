import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `benchmarks` is run from the repository, not installed


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    return ROOT / "vllm_dlm/demo/checkpoint"


@pytest.fixture(scope="session")
def filler():
    from examples.demo.tasks import Filler

    return Filler(seed=77, sentences=1_000)
