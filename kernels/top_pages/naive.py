"""The definition: a stable sort."""

import torch


def top_pages(scores, k):
    """scores [B, Hkv, N] -> [B, Hkv, k] int32, ascending, -1 where fewer than k pages have a score above -inf"""
    out = torch.full((*scores.shape[:2], k), -1, dtype=torch.int32)
    for b, h in torch.cartesian_prod(*map(torch.arange, scores.shape[:2])).tolist():
        order = scores[b, h].sort(descending=True, stable=True)[1]
        chosen = order[scores[b, h][order] > -torch.inf][:k].sort()[0]
        out[b, h, : len(chosen)] = chosen
    return out
