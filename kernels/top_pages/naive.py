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


def unless_alike(pages, before, share):
    """See dispatch.py"""
    same = overlap(pages, before) >= share
    mask = same[:, None, None]
    return same, pages.masked_fill(mask, -1), torch.where(mask, before[..., : pages.shape[2]], pages)


def overlap(pages, before):
    """-> [B] what share of the pages were there before"""
    out = torch.zeros(len(pages))
    for b in range(len(pages)):
        there = pages[b] >= 0
        found = torch.stack([torch.isin(own, old) for own, old in zip(pages[b], before[b], strict=True)]) & there
        out[b] = found.sum() / there.sum()
    return out
