"""Fake GPUs: tensors that claim to be on one."""

from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


@contextmanager
def fake_gpu():
    """Context in which new tensors are on a GPU and have no contents, so reading a value fails. (Indexing in Python
    needs a GPU driver even then; `select` and `unsqueeze` do not.)"""
    with FakeTensorMode(), torch.device("cuda"):
        yield


class OnGpu(torch.Tensor):
    """A CPU tensor that claims to be on a GPU. Results computed from it are plain CPU tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cuda = True


def on_gpu(x: torch.Tensor) -> torch.Tensor:
    """x as OnGpu. It shares x's memory, so x sees what a kernel writes."""
    return x.as_subclass(OnGpu)
