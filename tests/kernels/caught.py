"""Intercepts kernel launches before they reach a GPU, and derives what Triton would compile for each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor
from triton.compiler import ASTSource

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int8: "i8",
    torch.bool: "i1",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


class Launch(NamedTuple):
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


def catch_launches(monkeypatch, kept: Callable[[Launch], Any] = lambda launch: launch) -> list:
    """What is `kept` of each launch. A launch itself keeps its tensors, which are gigabytes where there are many."""
    caught: list = []

    def run(kernel, *args, grid, warmup, **kwargs):
        assert all(0 < extent < limit for extent, limit in zip(grid, (1 << 31, 1 << 16, 1 << 16), strict=False))
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        caught.append(kept(Launch(kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs, options)))

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    return caught


def source(kernel, arguments: dict[str, Any]) -> ASTSource:
    """Source specialized as at a launch: for integers equal to 1, and for addresses and integers divisible by 16,
    unless the kernel disables this."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value, plain = arguments[parameter.name], parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not plain):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32" if value < 1 << 31 else "i64"
        if not plain and not parameter.do_not_specialize_on_alignment and divisible(value):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def divisible(value) -> bool:
    """Whether a value, or the address of a tensor, is divisible by 16"""
    if isinstance(value, FakeTensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def compiled(launch: Launch) -> tuple:
    """Key of the kernel variant that Triton compiles for a launch"""
    found = source(launch.kernel, launch.arguments)
    return launch.kernel.__name__, *map(str, (found.signature, found.constants, found.attrs, launch.options))
