"""Launches captured as CUDA graphs, and the state of the device after a capture that failed."""

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
    """Captures CUDA graphs into one memory pool: they are never replayed side by side."""

    def __init__(self, device: torch.device):
        self.device = device
        self.pool: tuple[int, int] | None = None
        #: the allocators still refer to graphs whose capture could not be ended
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
                first = error.__context__ or error  # ending the capture raised after what invalidated it
                raise PoolLost(f"{type(first).__name__}: {first}") from first
            raise
        return graph, out

    def _abandon(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
        """Cleans up where `torch.cuda.graph` does not: an illegal call invalidates the capture, ending it raises, the
        capturing stream stays current and the allocator believes that the capture goes on. The allocator of pinned
        memory believes so, too, and cannot be told otherwise: captures into the same pool would be refused."""
        torch.cuda.set_stream(stream)
        with suppress(RuntimeError):  # the capture had not begun
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool)
        self.lost.append(graph)
        self.pool = None


def device_works(device: torch.device) -> None:
    """Raises unless the device still computes: a fault such as an illegal address fails every later call, while a
    failed capture does not."""
    torch.zeros(1, device=device).add_(1)
    torch.cuda.synchronize(device)


class Repeated:
    """Stands for a graph where there is no GPU: calls the function again, over the same memory."""

    def __init__(self, function: Callable[[], torch.Tensor]):
        self.function, self.out = function, function()

    def replay(self) -> None:
        self.out.copy_(self.function())


def repeated(function: Callable[[], torch.Tensor]) -> tuple[Graph, torch.Tensor]:
    graph = Repeated(function)
    return graph, graph.out
