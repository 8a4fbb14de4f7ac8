"""The definition: a stable sort."""

import torch


def top_pages(scores, k, kept=None, names=None):
    """See dispatch.py"""
    out = torch.full((*scores.shape[:2], k), -1, dtype=torch.int32)
    for b, h in torch.cartesian_prod(*map(torch.arange, scores.shape[:2])).tolist():
        order = scores[b, h].sort(descending=True, stable=True)[1]
        chosen = order[scores[b, h][order] > -torch.inf][: k if kept is None else int(kept[b])].sort()[0]
        out[b, h, : len(chosen)] = chosen if names is None else names[b, h, chosen]
    return out


def store_top_pages(out, rows, scores, k, kept=None, names=None):
    """See dispatch.py"""
    found = top_pages(scores, k, kept, names)
    for b, h in torch.cartesian_prod(*map(torch.arange, scores.shape[:2])).tolist():
        if (scores[b, h] > -torch.inf).any():
            out[rows[b], h] = -1
            out[rows[b], h, :k] = found[b, h]


def unless_alike(pages, before, rows, known, share):
    """See dispatch.py"""
    left = torch.full_like(pages, -1)
    for b, alike in enumerate(overlap(pages, before[rows]) >= share):
        if not (known[b] and alike):
            left[b], before[rows[b]] = pages[b], -1
            before[rows[b], :, : pages.shape[2]] = pages[b]
    return left


def overlap(pages, before):
    """-> [B] share of the pages that are among the earlier ones"""
    out = torch.zeros(len(pages))
    for b in range(len(pages)):
        there = pages[b] >= 0
        found = torch.stack([torch.isin(own, old) for own, old in zip(pages[b], before[b], strict=True)]) & there
        out[b] = found.sum() / there.sum()
    return out
