"""The definition, term by term, in float64."""

import torch


def lowpass(keys, taps, levels):
    """See dispatch.py"""
    low = keys.double()
    for _ in range(levels):
        count = low.shape[-2]
        out = torch.zeros_like(low[..., : count // 2, :])
        for i in range(count // 2):
            for j, tap in enumerate(taps):
                out[..., i, :] += tap * low[..., (2 * i + len(taps) // 2 - j) % count, :]
        low = out
    return low
