"""Which of pytest-xdist's processes runs which test, and in what order. tests/conftest.py imports these hooks."""

import os
import time

import pytest

#: Files that use one of the servers of tests/integration/conftest.py, and the server. Each server is started once, by
#: the process that runs all of its files.
SERVERS = {
    "tests/integration/test_server_view.py": "viewed",
    "tests/integration/test_server_page.py": "viewed",
    "tests/integration/test_server_selections.py": "viewed",
    "tests/integration/test_server_followers.py": "viewed",
    "tests/integration/test_server": "server",
    "tests/integration/test_scale_out.py": "server",
}
#: What takes longest comes first, so that both processes end at about the same time.
FIRST = (
    "server",
    "tests/engine/test_matrix.py",
    "tests/kernels/test_triton_interpreter.py",
    "viewed",
    "tests/engine/test_captured.py",
    "tests/kernels/test_triton_compile.py",
    "tests/pretended_gpu/test_pretended_gpu.py",
    "tests/engine/test_soak.py",
    "tests/engine/test_view.py",
    "tests/engine/test_prefixes.py",
    "tests/external/test_quest.py",
    "tests/engine/test_block_selection.py",
    "tests/engine/test_block_causal.py",
    "tests/engine/test_scoring.py",
)
#: When slow tests are no longer begun, in seconds since the epoch: see .ci/run
DEADLINE = "TEST_DEADLINE"


def scope(nodeid: str) -> str:
    """Tests of one scope run in one process: those of a file, which share engines, or those of a server."""
    for path, server in SERVERS.items():
        if nodeid.startswith(path):
            return server
    return nodeid.split("::", 1)[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFileAndServer(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid)

    config.option.loadscopereorder = False  # the number of tests says little about their time
    return ByFileAndServer(config, log)


def pytest_collection_modifyitems(items):
    def place(item) -> int:
        own = scope(item.nodeid)
        return FIRST.index(own) if own in FIRST else len(FIRST)

    items.sort(key=place)


def pytest_runtest_setup(item):
    deadline = float(os.environ.get(DEADLINE, "inf"))
    if item.get_closest_marker("slow") and time.time() > deadline:
        pytest.skip(f"left out: {DEADLINE} has passed")
