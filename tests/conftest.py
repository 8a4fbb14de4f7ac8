"""Engines shared by the whole run: each checkpoint is started once.

They run inside the test process (no second start of vLLM, and tests can look
into the worker); the server tests and the tensor-parallel test cover vLLM's
multiprocess mode.
"""

import json
import os
import sys
from pathlib import Path

import pytest

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Tied to the same cores, the threads of two processes would wait for each other most of the time.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

GOLDEN = Path(__file__).parent / "golden"


def start_engine(checkpoint: str, **kwargs):
    import torch
    from vllm import LLM

    settings = {
        "dtype": "float32",
        "max_model_len": 256,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 27,
        "max_num_seqs": 64,
        "disable_log_stats": True,
    }
    if torch.cuda.is_available():  # beside others: what vLLM asks to be free when it starts
        settings["gpu_memory_utilization"] = 0.05
    path = GOLDEN / "checkpoints" / checkpoint
    settings["skip_tokenizer_init"] = not (path / "tokenizer_config.json").exists()
    return LLM(str(path), **(settings | kwargs))


@pytest.fixture(scope="session")
def engines():
    """engines(name, **settings) -> a running engine, kept for the session (dropping one would end
    torch.distributed for all)."""
    started = {}

    def get(checkpoint: str, **kwargs):
        key = (checkpoint, json.dumps(kwargs, sort_keys=True))
        if key not in started:
            started[key] = start_engine(checkpoint, **kwargs)
        return started[key]

    yield get
    KEPT.append(started)


#: Taken down one by one, engines collect garbage for minutes; they end with the process instead.
KEPT: list[dict] = []


#: files that ask the server of tests/integration/conftest.py, which is started once
SERVED = "tests/integration/test_server", "tests/integration/test_scale_out.py"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Of two processes one has all tests of a file, which share engines, and one all files that share the server."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFileAndServer(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return SERVED[0] if nodeid.startswith(SERVED) else super()._split_scope(nodeid)

    return ByFileAndServer(config, log)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    if KEPT:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[EXIT_STATUS])


def pytest_sessionfinish(session, exitstatus):
    session.config.stash[EXIT_STATUS] = int(exitstatus)


EXIT_STATUS = pytest.StashKey[int]()


@pytest.fixture(scope="session")
def golden_runs() -> dict:
    return json.loads((GOLDEN / "runs.json").read_text())["runs"]


def golden_tensors(run: str) -> dict:
    from safetensors.torch import load_file

    return load_file(GOLDEN / "runs" / f"{run}.safetensors")
