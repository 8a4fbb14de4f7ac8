"""The definition: row by row in float64, of a sum rounded to the dtype of the residual stream."""

import torch


def add_norm(x, added, weight, eps):
    """See dispatch.py"""
    out = x.new_empty(2, *x.shape)
    for i in range(len(x)):
        total = x[i] + added[i]
        precise = total.double()
        scale = 1 / torch.sqrt(precise.square().mean() + eps)
        out[0, i], out[1, i] = precise * scale * weight.double(), total
    return out
