"""One case of a kernel, and how to run it on a device."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from vllm_dlm.kernels.haar_pyramid import PageStatistics

#: dtype -> absolute and relative error that the rounding of inputs and results explains
DTYPES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class KernelCase(NamedTuple):
    name: str
    got: torch.Tensor
    want: torch.Tensor
    tolerance: float  # 0: equal


def word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def moved(value, here):
    """Tensors, and lists of them, on that device"""
    if isinstance(value, torch.Tensor):
        return value.to(here)
    if isinstance(value, PageStatistics):
        return PageStatistics(value.mean.to(here), value.spread.to(here), value.page_size, value.std_kind)
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        return [part.to(here) for part in value]
    return value


def compared(name: str, fast: Callable, naive: Callable, here, tolerance: float, *arguments) -> KernelCase:
    got = fast(*(moved(value, here) for value in arguments))
    return KernelCase(name, got.cpu(), naive(*arguments), tolerance)
