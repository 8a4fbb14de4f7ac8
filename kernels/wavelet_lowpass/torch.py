"""One gather per tap and level: every second sample, shifted periodically."""

import torch


def lowpass(
    keys: torch.Tensor,  # [..., N, D], N divisible by 2^levels
    taps: tuple[float, ...],  # taps of the wavelet's decomposition filter
    levels: int,
    counts: torch.Tensor | None = None,  # [B] number of valid keys in keys [B, ..., N, D], also divisible by 2^levels
) -> torch.Tensor:
    """-> [..., N / 2^levels, D] float32"""
    low = keys.float()
    for level in range(levels):
        start = torch.arange(0, low.shape[-2], 2, device=keys.device) + len(taps) // 2
        if counts is None:
            low = sum(tap * low.index_select(-2, (start - j) % low.shape[-2]) for j, tap in enumerate(taps))
        else:
            end = (counts >> level)[:, None]  # [B, 1]
            low = sum(tap * low.gather(-2, spread((start - j) % end, low)) for j, tap in enumerate(taps))
    return low


def spread(index, like):
    """Expands index [B, n] to [B, ..., n, D], for a gather from `like` [B, ..., N, D]"""
    return index.view(len(index), *[1] * (like.dim() - 3), -1, 1).expand(*like.shape[:-2], -1, like.shape[-1])
