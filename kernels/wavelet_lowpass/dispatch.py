"""Dispatches to torch, the only fast path, on every device."""

import torch

from vllm_dlm.kernels.wavelet_lowpass import torch as plain


def lowpass(
    keys: torch.Tensor,  # [..., N, D], N divisible by 2^levels
    taps: tuple[float, ...],  # taps of the wavelet's decomposition filter
    levels: int,
    counts: torch.Tensor | None = None,  # [B] number of valid keys in keys [B, ..., N, D], also divisible by 2^levels
) -> torch.Tensor:
    """-> [..., N / 2^levels, D] float32"""
    return plain.lowpass(keys, taps, levels, counts)
