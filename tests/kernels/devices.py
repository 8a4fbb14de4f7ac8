"""GPUs without one: tensors that claim to lie there."""

from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


@contextmanager
def fake_gpu():
    """Every tensor that is made lies on a GPU, and has a shape and no content: what would ask for one fails. (Indexing
    in Python needs a GPU's driver even then; `select` and `unsqueeze` do not.)"""
    with FakeTensorMode(), torch.device("cuda"):
        yield


class OnGpu(torch.Tensor):
    """Claims to lie on a GPU; what is computed from it does not."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cuda = True


def on_gpu(x: torch.Tensor) -> torch.Tensor:
    """The same memory: what a kernel writes to it is seen in x."""
    return x.as_subclass(OnGpu)
