"""Which implementation runs."""

import torch

from vllm_dlm.kernels.top_pages import torch as plain


def top_pages(
    scores: torch.Tensor,  # [B, Hkv, N] float32
    k: int,
    kept: torch.Tensor | None = None,  # [B] of each asker not more than so many, at most k; None: k
    names: torch.Tensor | None = None,  # [B, Hkv, N] int32: what pages are called, ascending; else by number
) -> torch.Tensor:
    """-> [B, Hkv, k] int32, ascending, -1 at the end where fewer pages are taken or have a score above -inf. Pages of
    score -inf must follow all others (they are those beyond the end)."""
    if scores.is_cuda:
        from vllm_dlm.kernels.top_pages import triton

        return triton.top_pages(scores, k, kept, names)
    return plain.top_pages(scores, k, kept, names)


def physical_pages(page_table: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """page_table [B, N], pages of each request [B, Hkv, K] -> where they lie, [B, Hkv, K]"""
    return page_table[:, None].expand(-1, pages.shape[1], -1).gather(2, pages.long())


def overlap(pages: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """What share of the `pages` [B, Hkv, K] of all heads are among those `before` [B, Hkv, M], both ascending with -1
    at the end -> [B] float32"""
    if pages.is_cuda:
        from vllm_dlm.kernels.top_pages import triton

        return triton.overlap(pages, before)
    return plain.overlap(pages, before)
