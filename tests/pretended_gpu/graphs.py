"""CUDA graphs as far as memory goes: what operators did with which tensors is kept, and done again with the same ones.
Python runs once, and so does whatever it reads, computes or decides."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


class Graph:
    """Stands for torch.cuda.CUDAGraph."""

    replays = 0

    def __init__(self, *_, **__):
        self.calls: list[tuple] = []

    def replay(self) -> None:
        Graph.replays += 1
        for function, args, kwargs, kept in self.calls:
            for old, new in zip(tree_leaves(kept), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Capture(TorchDispatchMode):
    """Stands for torch.cuda.graph."""

    graph: Graph | None = None

    def __init__(self, graph: Graph, *_, **__):
        super().__init__()
        self.own = graph

    def __enter__(self):
        Capture.graph = self.own
        return super().__enter__()

    def __exit__(self, *error):
        Capture.graph = None
        return super().__exit__(*error)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        assert operator is not torch.ops.aten._local_scalar_dense.default, "nobody may wait for a value here"
        made = operator(*args, **(kwargs or {}))
        self.own.calls.append((operator, args, kwargs or {}, made))
        return made


def one_launch(function):
    """What is one kernel on a GPU, and many operators and looks at values on a CPU."""

    def call(*args, **kwargs):
        if Capture.graph is None:
            return function(*args, **kwargs)
        with _disable_current_modes():
            made = function(*args, **kwargs)
        Capture.graph.calls.append((function, args, kwargs, made))
        return made

    return call


def install() -> None:
    from vllm.platforms import current_platform

    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, Capture
    type(current_platform).graph_pool_handle = staticmethod(lambda: (0, 0))
