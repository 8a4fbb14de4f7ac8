"""What a capture that fails leaves behind. PyTorch's part is played by a stand-in that fails as a GPU does."""

from types import SimpleNamespace

import pytest
import torch

from vllm_dlm.step.cuda_graphs import CudaGraphs, PoolLost


class Cuda:
    """Streams, captures and the allocator, as far as `torch.cuda.graph` moves them"""

    def __init__(self):
        self.stream, self.pools, self.capturing, self.invalid = "serving", 0, [], False

    def install(self, monkeypatch):
        cuda = self

        class Capture:
            def __init__(self, graph, pool, capture_error_mode):
                assert capture_error_mode == "thread_local"
                self.pool = pool

            def __enter__(self):
                cuda.stream = "capturing"
                if self.pool in cuda.capturing:
                    raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
                cuda.capturing.append(self.pool)

            def __exit__(self, *_):
                if cuda.invalid:  # as torch.cuda.graph: nothing after the call that raises is done
                    raise torch.AcceleratorError("operation failed due to a previous error during capture")
                cuda.capturing.remove(self.pool)
                cuda.stream = "serving"

        def new_pool():
            self.pools += 1
            return 0, self.pools

        monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
        monkeypatch.setattr(torch.cuda, "graph", Capture)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", new_pool)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.stream)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "stream", stream))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda _, pool: self.capturing.remove(pool))


@pytest.fixture
def cuda(monkeypatch):
    made = Cuda()
    made.install(monkeypatch)
    return made


def waits():
    raise torch.AcceleratorError("operation not permitted when stream is capturing")


def test_an_exception_that_leaves_the_capture_valid(cuda):
    graphs = CudaGraphs(torch.device("cpu"))
    with pytest.raises(torch.AcceleratorError, match="not permitted"):
        graphs(waits)
    assert cuda.stream == "serving" and not cuda.capturing and not graphs.lost
    assert graphs(lambda: torch.ones(1))[1] == 1 and cuda.pools == 1


def test_an_exception_that_invalidates_the_capture(cuda):
    graphs = CudaGraphs(torch.device("cpu"))
    cuda.invalid = True
    with pytest.raises(PoolLost, match="not permitted") as lost:
        graphs(waits)
    assert "not permitted" in str(lost.value.__cause__)
    assert cuda.stream == "serving" and not cuda.capturing, "the engine goes on in its own stream"
    assert len(graphs.lost) == 1
    cuda.invalid = False
    assert graphs(lambda: torch.ones(1))[1] == 1 and cuda.pools == 2
