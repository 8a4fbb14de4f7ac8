"""The k-th highest score is the threshold; among pages that tie with it, the lowest are taken."""

import torch


def top_pages(scores, k, kept=None, names=None):
    """See dispatch.py"""
    counts = [] if kept is None else kept.tolist()
    if len(counts) == 1:
        pages = padded(some(scores, counts[0]), k)
    elif counts:  # each request has its own bound
        pages = torch.cat([padded(some(own[None], count), k) for own, count in zip(scores, counts, strict=True)])
    else:
        pages = top(scores, k)
    if names is None:
        return pages
    return names.gather(-1, pages.clamp_min(0).long()).to(torch.int32).masked_fill_(pages < 0, -1)


def padded(pages, k):
    return torch.nn.functional.pad(pages, (0, k - pages.shape[-1]), value=-1)


def some(scores, k):
    """Like `top` for one request, without a search if no page has a score above -inf."""
    if bool((scores[..., 0] == -torch.inf).all()):
        return scores.new_full((*scores.shape[:2], k), -1, dtype=torch.int32)
    return top(scores, k)


def top(scores, k):
    """-> [B, Hkv, k]"""
    *shape, width = scores.shape
    taken = min(k, width)
    if not taken:
        return scores.new_full((*shape, k), -1, dtype=torch.int32)
    threshold = scores.kthvalue(width - taken + 1, -1, keepdim=True)[0]
    above = scores > threshold
    level = scores == threshold
    room = taken - above.sum(-1, keepdim=True)
    chosen = above | (level & (level.cumsum(-1) <= room))  # exactly `taken` in each row
    pages = chosen.nonzero()[:, -1].view(*shape, taken).to(torch.int32)
    if k > width or taken == width or bool((threshold == -torch.inf).any()):
        # drop pages with score -inf; they come last, so the order is unchanged
        pages = pages.masked_fill(scores.gather(-1, pages.long()) == -torch.inf, -1)
        pages = padded(pages, k)
    return pages


def store_top_pages(out, rows, scores, k, kept=None, names=None):
    """See dispatch.py"""
    scored = scores[..., :1] > -torch.inf  # pages without a score come last
    if bool(scored.any()):
        pages = padded(top_pages(scores, k, kept, names), out.shape[2])
        out.index_copy_(0, rows, torch.where(scored, pages, out.index_select(0, rows)))


def unless_alike(pages, before, rows, known, share):
    """See dispatch.py"""
    own = before.index_select(0, rows)
    same = ((overlap(pages, own) >= share) & known)[:, None, None]
    before.index_copy_(0, rows, torch.where(same, own, padded(pages, before.shape[2])))
    return pages.masked_fill(same, -1)


def overlap(pages, before):
    """-> [B] share of the pages that are among the earlier ones"""
    there = pages >= 0
    known = before.masked_fill(before < 0, torch.iinfo(before.dtype).max)  # still ascending
    place = torch.searchsorted(known, pages).clamp_max_(known.shape[-1] - 1)
    found = (known.gather(-1, place) == pages) & there
    return found.flatten(1).sum(1) / there.flatten(1).sum(1)
