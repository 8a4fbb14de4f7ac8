"""The same tokens for a request whoever shares its batch, in whatever order, on however many ranks and blocks."""

import json
import random
import subprocess
import sys

import pytest

from tests.conftest import GOLDEN
from tests.engine.batches import mixed_requests
from tests.engine.running import tokens
from tests.engine.worker_calls import open_requests
from tests.tiers import slow


@pytest.fixture(scope="module")
def together(engines):
    """tokens of the 32 requests submitted at once, per checkpoint"""

    class Together(dict):
        def __missing__(self, checkpoint: str):
            self[checkpoint] = tokens(engines(checkpoint), list(mixed_requests()))
            return self[checkpoint]

    return Together()


@pytest.mark.parametrize("checkpoint", ["llada-tiny", *slow("dream-tiny")])
class TestInvariance:
    def test_the_requests_differ(self, together, checkpoint):
        assert len(set(together[checkpoint])) == 32

    @pytest.mark.slow  # test_matrix.py compares other requests with themselves alone
    def test_alone(self, engines, together, checkpoint):
        for index, request in enumerate(mixed_requests()):
            assert tokens(engines(checkpoint), [request]) == [together[checkpoint][index]], index

    def test_another_order(self, engines, together, checkpoint):
        order = list(range(32))
        random.Random(1).shuffle(order)
        requests = list(mixed_requests())
        got = tokens(engines(checkpoint), [requests[i] for i in order])
        assert got == [together[checkpoint][i] for i in order]

    def test_few_blocks(self, engines, together, checkpoint):
        """Room for one or two canvases: the others queue, and everything is free at the end."""
        llm = engines(checkpoint, block_size=32, num_gpu_blocks_override=10, max_num_batched_tokens=512)
        assert tokens(llm, list(mixed_requests())) == together[checkpoint]
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 9
        # the runner hears of the last finished requests with the next step
        assert llm.collective_rpc(open_requests)[0] <= 2


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["llada-tiny", "dream-tiny", "lladamoe-tiny"])
def test_two_ranks(together, checkpoint):
    """Tensor parallel, in processes of its own."""
    code = f"from tests.engine.test_invariance import two_ranks\nif __name__ == '__main__': two_ranks({checkpoint!r})"
    path = GOLDEN.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=path, capture_output=True, text=True, timeout=600, env=two_rank_environment()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (*_, line) = (line for line in done.stdout.splitlines() if line.startswith("TOKENS "))
    assert [tuple(given) for given in json.loads(line.removeprefix("TOKENS "))] == together[checkpoint]


def two_rank_environment() -> dict[str, str]:
    import os

    first, second = sorted(os.sched_getaffinity(0))[:2] if len(os.sched_getaffinity(0)) > 1 else (0, 0)
    return {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"{first}|{second}",  # vLLM asserts on `auto` with one memory node
    }


def two_ranks(checkpoint: str) -> None:
    from tests.conftest import start_engine

    llm = start_engine(checkpoint, tensor_parallel_size=2)
    print("TOKENS", json.dumps(tokens(llm, list(mixed_requests()))), flush=True)
