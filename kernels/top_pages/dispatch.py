"""Dispatches to Triton on a GPU and to torch elsewhere."""

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
    kept: torch.Tensor | None = None,  # [B] upper bound for each request, at most k; None: k
    names: torch.Tensor | None = None,  # [B, Hkv, N] int32 page numbers to return, ascending; None: the index
) -> torch.Tensor:
    """-> [B, Hkv, k] int32, ascending, padded with -1. Pages with score -inf are never taken; they must follow all
    others, because they are pages beyond the end."""
    if scores.is_cuda:
        return _top_pages(scores, k, kept, names)
    return plain.top_pages(scores, k, kept, names)


def store_top_pages(
    out: torch.Tensor,  # [S, Hkv, W >= k] int32
    rows: torch.Tensor,  # [B] int64 distinct row of each request
    scores: torch.Tensor,
    k: int,
    kept: torch.Tensor | None = None,
    names: torch.Tensor | None = None,
) -> None:
    """Stores the result of top_pages in rows of `out`, padded with -1. If no page of a head has a score above -inf, its
    row is left unchanged."""
    if scores.is_cuda:
        _store_top_pages(out, rows, scores, k, kept, names)
    else:
        plain.store_top_pages(out, rows, scores, k, kept, names)


def physical_pages(page_table: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """page_table [B, N], logical pages of each request [B, Hkv, K] -> physical pages [B, Hkv, K]"""
    return page_table[:, None].expand(-1, pages.shape[1], -1).gather(2, pages.long())


def unless_alike(
    pages: torch.Tensor,  # [B, Hkv, K] int32, ascending, -1 at the end
    before: torch.Tensor,  # [S, Hkv, M >= K] int32 earlier pages, in the same format
    rows: torch.Tensor,  # [B] int64 distinct row of each request in `before`
    known: torch.Tensor,  # [B] bool: whether `before` holds pages of the request
    share: float,
) -> torch.Tensor:
    """Keeps pages only of requests whose choice has changed: [B, Hkv, K], -1 for the other requests.

    A choice has changed if less than `share` of its pages, over all heads, are among the earlier ones. It then replaces
    them in `before`."""
    if pages.is_cuda:
        return _unless_alike(pages, before, rows, known, share)
    return plain.unless_alike(pages, before, rows, known, share)
