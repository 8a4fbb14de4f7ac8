"""The k-th highest score is a threshold; of the pages that tie with it the lowest are taken."""

import torch


def top_pages(scores, k):
    """See dispatch.py"""
    *shape, width = scores.shape
    taken = min(k, width)
    threshold = scores.kthvalue(width - taken + 1, -1, keepdim=True)[0]
    above = scores > threshold
    level = scores == threshold
    room = taken - above.sum(-1, keepdim=True)
    chosen = above | (level & (level.cumsum(-1) <= room))  # exactly `taken` in each row
    pages = chosen.nonzero()[:, -1].view(*shape, taken).to(torch.int32)
    if k > width or taken == width or bool((threshold == -torch.inf).any()):
        # -inf is no score: such pages leave, and since they are the last ones order stays
        pages = pages.masked_fill(scores.gather(-1, pages.long()) == -torch.inf, -1)
        pages = torch.nn.functional.pad(pages, (0, k - taken), value=-1)
    return pages
