"""The definition, term by term, in float64."""

import torch


def lowpass(keys, taps, levels, counts=None):
    """See torch.py"""
    if counts is not None:
        out = keys.new_full((*keys.shape[:-2], keys.shape[-2] >> levels, keys.shape[-1]), torch.nan).double()
        for own, given, count in zip(out, keys, counts.tolist(), strict=True):
            own[..., : count >> levels, :] = lowpass(given[..., :count, :], taps, levels)
        return out
    low = keys.double()
    for _ in range(levels):
        count = low.shape[-2]
        out = torch.zeros_like(low[..., : count // 2, :])
        for i in range(count // 2):
            for j, tap in enumerate(taps):
                out[..., i, :] += tap * low[..., (2 * i + len(taps) // 2 - j) % count, :]
        low = out
    return low
