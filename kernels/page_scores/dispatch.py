"""Which implementation runs."""

import torch

from vllm_dlm.kernels.haar_pyramid.statistics import PageStatistics
from vllm_dlm.kernels.page_scores import torch as plain


def page_scores(
    q: torch.Tensor,  # [Tq, H, D], the queries of request after request
    q_starts: torch.Tensor,  # [B + 1] where each request's queries start
    statistics: PageStatistics,
    page_table: torch.Tensor,  # [B, N] physical page of each logical one; anything beyond num_pages must be a page
    num_pages: torch.Tensor,  # [B]
    forced_from: torch.Tensor,  # [B] pages from here on are always read
    sink_pages: int,
    lam: float,
    reduce: str,
) -> torch.Tensor:
    """-> [B, Hkv, N] float32"""
    if q.is_cuda:
        from vllm_dlm.kernels.page_scores import triton

        return triton.page_scores(q, q_starts, statistics, page_table, num_pages, forced_from, sink_pages, lam, reduce)
    return plain.page_scores(q, q_starts, statistics, page_table, num_pages, forced_from, sink_pages, lam, reduce)


def run_scores(
    q: torch.Tensor,  # [L, H, D] queries of one request
    mean: torch.Tensor,  # [Hkv, N, D]
    spread: torch.Tensor,  # [Hkv, N, W]
    std_kind: str,
    forced_from: int | torch.Tensor,  # [1], if it is not known to the host
    sink_pages: int,
    lam: float,
    reduce: str,
) -> torch.Tensor:
    """The same for one request whose statistics lie side by side -> [1, Hkv, N] float32"""
    if q.is_cuda:
        from vllm_dlm.kernels.page_scores import triton

        return triton.run_scores(q, mean, spread, std_kind, forced_from, sink_pages, lam, reduce)
    return plain.run_scores(q, mean, spread, std_kind, forced_from, sink_pages, lam, reduce)
