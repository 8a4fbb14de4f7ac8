"""Captures CUDA graphs, and cleans up after a failed capture."""

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import torch


class Graph(Protocol):
    """Launches that can be repeated."""

    def replay(self) -> None: ...


#: runs a function and records its launches
Capture = Callable[[Callable[[], torch.Tensor]], tuple[Graph, torch.Tensor]]


class PoolLost(RuntimeError):
    """A capture failed and could not be ended, so its memory pool takes no further captures."""


class CudaGraphs:
    """Captures CUDA graphs into one memory pool, because they are never replayed concurrently."""

    def __init__(self, device: torch.device):
        self.device = device
        self.pool: tuple[int, int] | None = None
        #: graphs whose capture could not be ended; the allocators still refer to them
        self.lost: list[torch.cuda.CUDAGraph] = []

    def __call__(self, function: Callable[[], torch.Tensor]) -> tuple[Graph, torch.Tensor]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        try:
            # "thread_local": other threads may call the device while the engine serves.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                out = function()
        except Exception as error:
            if torch.cuda.current_stream() != stream:
                self._abandon(graph, stream)
                first = error.__context__ or error  # ending the capture raised after the error that invalidated it
                raise PoolLost(f"{type(first).__name__}: {first}") from first
            raise
        return graph, out

    def _abandon(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
        """Cleans up after an illegal call has invalidated a capture, which `torch.cuda.graph` does not: ending the
        capture raises, the capturing stream stays current, and the allocator still considers the capture active. The
        allocator of pinned memory does, too, and cannot be reset, so later captures into the same pool would fail."""
        torch.cuda.set_stream(stream)
        with suppress(RuntimeError):  # the capture had not begun
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool)
        self.lost.append(graph)
        self.pool = None


def device_works(device: torch.device) -> None:
    """Raises if the device no longer works: after a fault such as an illegal address every call fails, in contrast to a
    failed capture."""
    torch.zeros(1, device=device).add_(1)
    torch.cuda.synchronize(device)


class Repeated:
    """Replaces a graph without a GPU: calls the function again over the same memory."""

    def __init__(self, function: Callable[[], torch.Tensor]):
        self.function, self.out = function, function()

    def replay(self) -> None:
        self.out.copy_(self.function())


def repeated(function: Callable[[], torch.Tensor]) -> tuple[Graph, torch.Tensor]:
    graph = Repeated(function)
    return graph, graph.out
