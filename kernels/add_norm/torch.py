"""Residual addition and RMS normalization in float32, like vLLM's RMSNorm."""

import torch


def add_norm(x, added, weight, eps):
    """See dispatch.py"""
    total = x + added
    precise = total.float()
    normed = precise * torch.rsqrt(precise.square().mean(-1, keepdim=True) + eps)
    return torch.stack([(normed * weight.float()).to(x.dtype), total])
