"""Which implementation runs."""

import torch

from vllm_dlm.kernels.haar_pyramid.statistics import PageStatistics
from vllm_dlm.kernels.operators import operator
from vllm_dlm.kernels.page_scores import torch as plain

_page_scores = operator(
    "page_scores(Tensor q, Tensor q_starts, Tensor mean, Tensor spread, Tensor page_table, Tensor num_pages, "
    "Tensor forced_from, str std_kind, int sink_pages, float lam, str reduce) -> Tensor",
    __package__,
    lambda q, q_starts, mean, spread, table, *rest: q.new_empty(
        len(table), mean.shape[1], table.shape[1], dtype=torch.float32
    ),
)
_run_scores = operator(
    "run_scores(Tensor q, Tensor mean, Tensor spread, str std_kind, Tensor? forced_from, int known_from, "
    "int sink_pages, float lam, str reduce) -> Tensor",
    __package__,
    lambda q, mean, *rest: q.new_empty(1, *mean.shape[:2], dtype=torch.float32),
)


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
        kept = statistics.mean.select(2, 0), statistics.spread.select(2, 0)  # [pages, Hkv, D], [pages, Hkv, W]
        return _page_scores(
            q, q_starts, *kept, page_table, num_pages, forced_from, statistics.std_kind, sink_pages, lam, reduce
        )
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
        start, known = (forced_from, 0) if isinstance(forced_from, torch.Tensor) else (None, forced_from)
        return _run_scores(q, mean, spread, std_kind, start, known, sink_pages, lam, reduce)
    return plain.run_scores(q, mean, spread, std_kind, forced_from, sink_pages, lam, reduce)
