"""Which implementation runs: torch's on every device."""

import torch

from vllm_dlm.kernels.wavelet_lowpass import torch as plain


def lowpass(
    keys: torch.Tensor,  # [..., N, D], N divisible by 2^levels
    taps: tuple[float, ...],  # of the wavelet's decomposition filter
    levels: int,
    counts: torch.Tensor | None = None,  # [B] of keys [B, ..., N, D] so many are there, also divisible
) -> torch.Tensor:
    """-> [..., N / 2^levels, D] float32"""
    return plain.lowpass(keys, taps, levels, counts)
