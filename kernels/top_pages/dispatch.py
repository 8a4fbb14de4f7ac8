"""Which implementation runs."""

import torch

from vllm_dlm.kernels.operators import operator
from vllm_dlm.kernels.top_pages import torch as plain

_top_pages = operator(
    "top_pages(Tensor scores, int k, Tensor? kept, Tensor? names) -> Tensor",
    __package__,
    lambda scores, k, *rest: scores.new_empty(*scores.shape[:-1], k, dtype=torch.int32),
)
_store_top_pages = operator(
    "store_top_pages(Tensor(a!) out, Tensor rows, Tensor scores, int k, Tensor? kept, Tensor? names) -> ()",
    __package__,
    lambda *arguments: None,
)
_unless_alike = operator(
    "unless_alike(Tensor pages, Tensor(a!) before, Tensor rows, Tensor known, float share) -> Tensor",
    __package__,
    lambda pages, *rest: pages.new_empty(pages.shape),
)


def top_pages(
    scores: torch.Tensor,  # [B, Hkv, N] float32
    k: int,
    kept: torch.Tensor | None = None,  # [B] of each asker not more than so many, at most k; None: k
    names: torch.Tensor | None = None,  # [B, Hkv, N] int32: what pages are called, ascending; else by number
) -> torch.Tensor:
    """-> [B, Hkv, k] int32, ascending, -1 at the end where fewer pages are taken or have a score above -inf. Pages of
    score -inf must follow all others (they are those beyond the end)."""
    if scores.is_cuda:
        return _top_pages(scores, k, kept, names)
    return plain.top_pages(scores, k, kept, names)


def store_top_pages(
    out: torch.Tensor,  # [S, Hkv, W >= k] int32
    rows: torch.Tensor,  # [B] int64 row of each asker, no two alike
    scores: torch.Tensor,
    k: int,
    kept: torch.Tensor | None = None,
    names: torch.Tensor | None = None,
) -> None:
    """What top_pages finds goes into rows of `out`, -1 behind it. What stands there stays where no page of a head has a
    score."""
    if scores.is_cuda:
        _store_top_pages(out, rows, scores, k, kept, names)
    else:
        plain.store_top_pages(out, rows, scores, k, kept, names)


def physical_pages(page_table: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """page_table [B, N], pages of each request [B, Hkv, K] -> where they lie, [B, Hkv, K]"""
    return page_table[:, None].expand(-1, pages.shape[1], -1).gather(2, pages.long())


def unless_alike(
    pages: torch.Tensor,  # [B, Hkv, K] int32, ascending, -1 at the end
    before: torch.Tensor,  # [S, Hkv, M >= K] int32, the same
    rows: torch.Tensor,  # [B] int64 row of each asker in `before`, no two alike
    known: torch.Tensor,  # [B] bool: whether anything was there before
    share: float,
) -> torch.Tensor:
    """The pages of askers that share less than that with those before, all heads together: [B, Hkv, K], -1 for the
    others. Theirs then take the place of those before."""
    if pages.is_cuda:
        return _unless_alike(pages, before, rows, known, share)
    return plain.unless_alike(pages, before, rows, known, share)
