"""The definition: canvas by canvas, a stable sort."""

import math

import torch


def lowest_rows(score, forced, starts, places, total):
    """See dispatch.py"""
    out = torch.full((total,), -1, dtype=torch.int64)

    def order(row):
        value = float(score[row])
        return not forced[row], math.isnan(value), value

    for first, end, place, following in zip(starts, starts[1:], places, places[1:], strict=False):
        chosen = sorted(sorted(range(int(first), int(end)), key=order)[: int(following - place)])
        out[int(place) : int(place) + len(chosen)] = torch.tensor(chosen)
    return out
