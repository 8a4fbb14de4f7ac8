"""Which implementation runs."""

import torch

from vllm_dlm.kernels.operators import operator
from vllm_dlm.kernels.top_pages import torch as plain

_top_pages = operator(
    "top_pages(Tensor scores, int k, Tensor? kept, Tensor? names) -> Tensor",
    __package__,
    lambda scores, k, *rest: scores.new_empty(*scores.shape[:-1], k, dtype=torch.int32),
)
_unless_alike = operator(
    "unless_alike(Tensor pages, Tensor before, float share) -> (Tensor, Tensor, Tensor)",
    __package__,
    lambda pages, before, share: (
        pages.new_empty(len(pages), dtype=torch.bool), pages.new_empty(pages.shape), pages.new_empty(pages.shape)
    ),
)  # fmt: skip


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


def physical_pages(page_table: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """page_table [B, N], pages of each request [B, Hkv, K] -> where they lie, [B, Hkv, K]"""
    return page_table[:, None].expand(-1, pages.shape[1], -1).gather(2, pages.long())


def unless_alike(
    pages: torch.Tensor,  # [B, Hkv, K] int32, ascending, -1 at the end
    before: torch.Tensor,  # [B, Hkv, M >= K] int32, the same
    share: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Askers of whose pages, those of all heads together, at least that share were there before: [B] bool; the pages
    of the others, of these -1; the pages of the others, of these those before: [B, Hkv, K] each"""
    if pages.is_cuda:
        return _unless_alike(pages, before, share)
    return plain.unless_alike(pages, before, share)
