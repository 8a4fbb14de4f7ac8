"""vLLM's RMS normalization for CPUs, in one pass over the sum, in float32."""

import torch


def runs(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether vLLM for CPUs is imported and its kernel supports these rows: one dtype, whole vectors"""
    there = hasattr(torch.ops._C, "rms_norm") and torch._C._dispatch_has_kernel_for_dispatch_key("_C::rms_norm", "CPU")
    return there and x.dtype == weight.dtype and x.shape[-1] % 16 == 0


def add_norm(x, added, weight, eps):
    """See dispatch.py"""
    out = x.new_empty(2, *x.shape)
    torch.add(x, added, out=out[1])
    torch.ops._C.rms_norm(out[0], out[1], weight, eps)
    return out
