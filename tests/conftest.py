"""Engines shared by the whole run: each checkpoint is started once.

They run inside the test process (no second start of vLLM, and tests can look
into the worker); the server tests and the tensor-parallel test cover vLLM's
multiprocess mode.
"""

import json
import os
import resource
import sys

import pytest

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Tied to the same cores, the threads of two processes would wait for each other most of the time.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from tests.engines import GOLDEN, Engines, start_engine
from tests.scheduling import pytest_collection_modifyitems, pytest_runtest_setup, pytest_xdist_make_scheduler

__all__ = [
    "GOLDEN",
    "pytest_collection_modifyitems",
    "pytest_runtest_setup",
    "pytest_xdist_make_scheduler",
    "start_engine",
]


@pytest.fixture(scope="session")
def engines():
    """engines(name, **settings) -> a running engine, kept for the session (dropping one would end
    torch.distributed for all)."""
    ENGINES.append(Engines())
    return ENGINES[-1]


def pytest_collection_finish():
    """vLLM inspects each model class in a process of its own, so that this one does not initialise CUDA. Here each of
    those would only cost the time in which vLLM is imported."""
    registry = sys.modules.get("vllm.model_executor.models.registry")
    if registry is not None:
        registry._run_in_subprocess = lambda inspect: inspect()


#: Engines take minutes of garbage collection if they are shut down one by one. They end with the process instead.
ENGINES: list[Engines] = []
USED: list[str | None] = []  # a line of each test process
EXIT_STATUS = pytest.StashKey[int]()


def pytest_sessionfinish(session, exitstatus):
    session.config.stash[EXIT_STATUS] = int(exitstatus)
    output = getattr(session.config, "workeroutput", None)  # of a process of pytest-xdist
    if output is not None:
        output["used"] = used()
    elif not session.config.pluginmanager.hasplugin("dsession"):  # otherwise its processes run the tests
        USED.append(used())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    USED.append(getattr(node, "workeroutput", {}).get("used"))


def pytest_terminal_summary(terminalreporter):
    for line in filter(None, USED):
        terminalreporter.write_line(line)


def used() -> str:
    """Engines that this process started, and its peak memory"""
    seconds = [each for engines in ENGINES for each in engines.seconds.values()]
    own, child = (
        resource.getrusage(who).ru_maxrss / (1 << 20) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return (
        f"{len(seconds)} engines started in {sum(seconds):.0f} s; peak memory of the process {own:.1f} GiB, "
        f"of the largest one it started {child:.1f} GiB"
    )


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    if ENGINES:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[EXIT_STATUS])


@pytest.fixture(scope="session")
def golden_runs() -> dict:
    return json.loads((GOLDEN / "runs.json").read_text())["runs"]


def golden_tensors(run: str) -> dict:
    from safetensors.torch import load_file

    return load_file(GOLDEN / "runs" / f"{run}.safetensors")
