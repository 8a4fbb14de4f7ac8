"""Kernels as they are called on a GPU, run by Triton's interpreter, whose rounding is mended. Memory that a launcher
allocates holds garbage. Case files import this module's fixtures (`from … import *`)."""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from vllm_dlm.kernels import operators

__all__ = ["bfloat16_is_rounded", "garbage", "operators_take_tensors_of_the_cpu"]


@pytest.fixture(autouse=True, scope="module")
def operators_take_tensors_of_the_cpu():
    for name, launch in operators.LAUNCHERS.items():
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{operators.NAMESPACE}::{name}", "CPU"):
            operators._LIBRARY.impl(name, launch, "CPU")


@pytest.fixture(autouse=True)
def garbage(monkeypatch):
    def poisoned(make):
        def empty(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(torch.nan if made.is_floating_point() else -77)

        return empty

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


@pytest.fixture(autouse=True)
def bfloat16_is_rounded(monkeypatch):
    """To the nearest, as GPUs do. The interpreter cuts bits off."""
    convert = interpreter._convert_float

    def rounded(values, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        bits = values.astype(np.float32).view(np.uint32)
        nearest = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
        return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
