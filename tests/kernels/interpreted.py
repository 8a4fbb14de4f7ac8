"""Fixtures to run GPU kernels with Triton's interpreter, with its rounding corrected. Memory that a launcher allocates
holds garbage, and every access must be within a tensor passed to the kernel. Case files import these fixtures
(`from … import *`)."""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from vllm_dlm.kernels import operators

__all__ = ["bfloat16_is_rounded", "garbage", "operators_take_tensors_of_the_cpu", "within_bounds"]


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
    """Rounds to nearest, as GPUs do. The interpreter truncates."""
    convert = interpreter._convert_float

    def rounded(values, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        bits = values.astype(np.float32).view(np.uint32)
        nearest = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
        return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture(autouse=True)
def within_bounds(monkeypatch):
    """Checks accesses, because on a GPU reading out of bounds often goes unnoticed."""
    given: list[tuple[int, int]] = []  # address of each tensor's first byte, and of the byte after its last
    on_host, builder = interpreter.GridExecutor._init_args_hst, interpreter.InterpreterBuilder
    load, store, change = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

    def noted(self, args, kwargs):
        made = on_host(self, args, kwargs)
        given[:] = [extent(one) for one in (*made[0], *made[1].values()) if isinstance(one, torch.Tensor)]
        return made

    def check(pointers, mask):
        size = pointers.dtype.element_ty.primitive_bitwidth // 8
        addresses = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)]
        inside = np.zeros(addresses.shape, bool)
        for first, end in given:
            inside |= (addresses >= first) & (addresses + size <= end)
        assert inside.all(), "an address outside all tensors that the kernel was given"

    def checked_load(self, pointers, mask, *rest, **options):
        check(pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def checked_store(self, pointers, value, mask, *rest, **options):
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest, **options)

    def checked_change(self, operation, pointers, value, mask, *rest, **options):
        check(pointers, mask)
        return change(self, operation, pointers, value, mask, *rest, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", noted)
    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
    monkeypatch.setattr(builder, "create_atomic_rmw", checked_change)


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    first = tensor.data_ptr()
    if not tensor.numel():
        return first, first
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (last + 1) * tensor.element_size()
