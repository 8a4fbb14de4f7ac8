"""Which implementation runs."""

import torch

from vllm_dlm.kernels.operators import operator
from vllm_dlm.kernels.top_pages import torch as plain

_top_pages = operator(
    "top_pages(Tensor scores, int k) -> Tensor",
    __package__,
    lambda scores, k: scores.new_empty(*scores.shape[:-1], k, dtype=torch.int32),
)


def top_pages(scores: torch.Tensor, k: int) -> torch.Tensor:
    """scores [B, Hkv, N] float32 -> [B, Hkv, k] int32, ascending, -1 at the end where fewer than k pages have a score
    above -inf. Pages of score -inf must follow all others (they are those beyond the end)."""
    if scores.is_cuda:
        return _top_pages(scores, k)
    return plain.top_pages(scores, k)


def physical_pages(page_table: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """page_table [B, N], pages of each request [B, Hkv, K] -> where they lie, [B, Hkv, K]"""
    return page_table[:, None].expand(-1, pages.shape[1], -1).gather(2, pages.long())
