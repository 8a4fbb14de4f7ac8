"""Dispatches to Triton on a GPU and to torch elsewhere."""

import torch

from vllm_dlm.kernels.haar_pyramid.statistics import PageStatistics
from vllm_dlm.kernels.operators import operator
from vllm_dlm.kernels.page_scores import torch as plain

_page_scores = operator(
    "page_scores(Tensor q, Tensor q_starts, Tensor q_ends, Tensor? voters, Tensor mean, Tensor spread, "
    "Tensor page_table, Tensor num_pages, Tensor forced_from, Tensor? sinks, int sink_pages, str std_kind, float lam, "
    "str reduce, float sharpness) -> Tensor",
    __package__,
    lambda q, starts, ends, voters, mean, spread, table, *rest: q.new_empty(
        len(table), mean.shape[1], table.shape[1] * mean.shape[2], dtype=torch.float32
    ),
)
_half_scores = operator(
    "half_scores(Tensor q, Tensor q_starts, Tensor q_ends, Tensor? voters, Tensor cache, Tensor block_table, "
    "Tensor runs, int size, Tensor forced_from, Tensor sinks, float lam, str reduce, float sharpness) "
    "-> (Tensor, Tensor)",
    __package__,
    lambda q, starts, ends, voters, cache, table, runs, *rest: (
        q.new_empty(*runs.shape[:2], 2 * runs.shape[2], dtype=torch.float32),
        q.new_empty(*runs.shape[:2], 2 * runs.shape[2], dtype=torch.int32),
    ),
)


def page_scores(
    q: torch.Tensor,  # [Tq, H, D], queries packed request by request
    q_starts: torch.Tensor,  # [B + 1] where each request's queries start; with q_ends [B]
    statistics: PageStatistics,  # each entry describes n pages (its nodes)
    page_table: torch.Tensor,  # [B, N] entry of each n pages of a request; must be valid even beyond num_pages
    num_pages: torch.Tensor,  # [B]
    forced_from: torch.Tensor,  # [B] pages from here on are always read
    sink_pages: int | torch.Tensor,  # number of first pages that are always read; [B] if it differs between requests
    lam: float,
    reduce: str,
    q_ends: torch.Tensor | None = None,  # [B] where each request's queries end; None: where the next one's start
    voters: torch.Tensor | None = None,  # [Tq] bool; None: all
    sharpness: float = 1.0,  # factor applied to the queries
) -> torch.Tensor:
    """-> [B, Hkv, N * n] float32"""
    if q.is_cuda:
        ends = q_starts.narrow(0, 1, len(page_table)) if q_ends is None else q_ends
        sinks, number = (sink_pages, 0) if isinstance(sink_pages, torch.Tensor) else (None, sink_pages)
        return _page_scores(
            q,
            q_starts,
            ends,
            voters,
            statistics.mean,
            statistics.spread,
            page_table,
            num_pages,
            forced_from,
            sinks,
            number,
            statistics.std_kind,
            lam,
            reduce,
            sharpness,
        )
    arguments = (q, q_starts, statistics, page_table, num_pages, forced_from, sink_pages, lam, reduce)
    return plain.page_scores(*arguments, q_ends, voters, sharpness)


def half_scores(
    q: torch.Tensor,  # [Tq, H, D]
    q_starts: torch.Tensor,  # [B] where each request's queries start
    q_ends: torch.Tensor,  # [B] where they end
    cache: torch.Tensor,  # [blocks, Hkv, block_size, 2 * D], keys before values
    block_table: torch.Tensor,  # [B, blocks]
    runs: torch.Tensor,  # [B, Hkv, n] int32 runs of 2 * size keys, padded with -1
    size: int,  # keys per half, a power of two; a run does not cross blocks
    forced_from: torch.Tensor,  # [B] halves from here on are always read, as an index into the 2 * n halves
    sinks: torch.Tensor,  # [B] number of first halves that are always read
    lam: float,  # if above 0, the standard deviation of each channel counts
    reduce: str,
    voters: torch.Tensor | None = None,  # [Tq] bool; None: all
    sharpness: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> scores of both halves of each run, interleaved, and the index of each half as a run of `size` keys:
    [B, Hkv, 2 * n] float32 and int32"""
    arguments = (cache, block_table, runs, size, forced_from, sinks, lam, reduce)
    if q.is_cuda:
        return _half_scores(q, q_starts, q_ends, voters, *arguments, sharpness)
    return plain.half_scores(q, q_starts, q_ends, *arguments, voters, sharpness)
