"""In float32, as vLLM's own normalisation is."""

import torch


def add_norm(x, added, weight, eps):
    """See dispatch.py"""
    total = x + added
    precise = total.float()
    normed = precise * torch.rsqrt(precise.square().mean(-1, keepdim=True) + eps)
    return torch.stack([(normed * weight.float()).to(x.dtype), total])
