"""Dispatches to Triton on a GPU and to torch elsewhere."""

import torch

from vllm_dlm.kernels.haar_pyramid.statistics import PageStatistics
from vllm_dlm.kernels.operators import operator
from vllm_dlm.kernels.page_scores import torch as plain
from vllm_dlm.kernels.page_scores.queries import ScoringQueries

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
    queries: ScoringQueries,
    statistics: PageStatistics,  # each entry describes n pages (its nodes)
    page_table: torch.Tensor,  # [B, N] entry of each n pages of a request; must be valid even beyond num_pages
    num_pages: torch.Tensor,  # [B]
    forced_from: torch.Tensor,  # [B] pages from here on are always read
    sinks: int | torch.Tensor,  # number of first pages that are always read; [B] if it differs between requests
) -> torch.Tensor:
    """-> [B, Hkv, N * n] float32"""
    if not queries.q.is_cuda:
        return plain.page_scores(queries, statistics, page_table, num_pages, forced_from, sinks)
    vectors = statistics.mean, statistics.spread, page_table, num_pages, forced_from
    marks = (sinks, 0) if isinstance(sinks, torch.Tensor) else (None, sinks)
    return _page_scores(*_packed(queries), *vectors, *marks, statistics.std_kind, *_rule(queries))


def half_scores(
    queries: ScoringQueries,
    cache: torch.Tensor,  # [blocks, Hkv, block_size, 2 * D], keys before values
    block_table: torch.Tensor,  # [B, blocks]
    runs: torch.Tensor,  # [B, Hkv, n] int32 runs of 2 * size keys, padded with -1
    size: int,  # keys per half, a power of two; a run does not cross blocks
    forced_from: torch.Tensor,  # [B] halves from here on are always read, as an index into the 2 * n halves
    sinks: torch.Tensor,  # [B] number of first halves that are always read
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> scores of both halves of each run, interleaved, and the index of each half as a run of `size` keys:
    [B, Hkv, 2 * n] float32 and int32. If lam is above 0, the standard deviation of each channel counts."""
    arguments = cache, block_table, runs, size, forced_from, sinks
    if queries.q.is_cuda:
        return _half_scores(*_packed(queries), *arguments, *_rule(queries))
    return plain.half_scores(queries, *arguments)


def _packed(queries: ScoringQueries) -> tuple:
    return queries.q, queries.starts, queries.ends, queries.voters


def _rule(queries: ScoringQueries) -> tuple:
    return queries.lam, queries.reduce, queries.sharpness
