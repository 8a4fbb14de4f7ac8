"""Which implementation runs."""

import torch

from vllm_dlm.kernels.haar_pyramid.statistics import PageStatistics
from vllm_dlm.kernels.page_scores import torch as plain


def page_scores(
    q: torch.Tensor,  # [Tq, H, D], the queries of request after request
    q_starts: torch.Tensor,  # [B + 1] where each request's queries start; with q_ends [B]
    statistics: PageStatistics,  # places of n pages each
    page_table: torch.Tensor,  # [B, N] place of each n pages of a request; anything beyond num_pages must be a place
    num_pages: torch.Tensor,  # [B]
    forced_from: torch.Tensor,  # [B] pages from here on are always read
    sink_pages: int | torch.Tensor,  # the first so many are; [B] if they are not the same for all
    lam: float,
    reduce: str,
    q_ends: torch.Tensor | None = None,  # [B] where each request's queries end; None: where the next one's start
    voters: torch.Tensor | None = None,  # [Tq] bool; None: all
    sharpness: float = 1.0,  # of the queries, which are multiplied by it
) -> torch.Tensor:
    """-> [B, Hkv, N * n] float32"""
    arguments = (q, q_starts, statistics, page_table, num_pages, forced_from, sink_pages, lam, reduce)
    if q.is_cuda:
        from vllm_dlm.kernels.page_scores import triton

        return triton.page_scores(*arguments, q_ends, voters, sharpness)
    return plain.page_scores(*arguments, q_ends, voters, sharpness)


def half_scores(
    q: torch.Tensor,  # [Tq, H, D]
    q_starts: torch.Tensor,  # [B] where each request's queries start
    q_ends: torch.Tensor,  # [B] and end
    cache: torch.Tensor,  # [blocks, Hkv, block_size, 2 * D], keys before values
    block_table: torch.Tensor,  # [B, blocks]
    runs: torch.Tensor,  # [B, Hkv, n] int32 runs of 2 * size keys, -1 at the end where a request has fewer
    size: int,  # a power of two; runs lie within blocks
    forced_from: torch.Tensor,  # [B] halves from here on, counted among those given, are always read
    sinks: torch.Tensor,  # [B] and the first so many
    lam: float,  # above 0: with the standard deviation of each channel
    reduce: str,
    voters: torch.Tensor | None = None,  # [Tq] bool; None: all
    sharpness: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of both halves of each run, side by side, and which run of `size` keys each half is:
    [B, Hkv, 2 * n] float32 and int32"""
    arguments = (q, q_starts, q_ends, cache, block_table, runs, size, forced_from, sinks, lam, reduce)
    if q.is_cuda:
        from vllm_dlm.kernels.page_scores import triton

        return triton.half_scores(*arguments, voters, sharpness)
    return plain.half_scores(*arguments, voters, sharpness)
