"""vLLM's RMS normalization for CPUs, one pass over the sum, in float32."""

import torch


def runs(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """vLLM is imported, and its kernel takes whole vectors of one dtype."""
    return hasattr(torch.ops._C, "rms_norm") and x.dtype == weight.dtype and x.shape[-1] % 16 == 0


def add_norm(x, added, weight, eps):
    """See dispatch.py"""
    out = x.new_empty(2, *x.shape)
    torch.add(x, added, out=out[1])
    torch.ops._C.rms_norm(out[0], out[1], weight, eps)
    return out
