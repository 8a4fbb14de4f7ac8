"""Queries that score pages, and the rule by which they do."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ScoringQueries:
    """Queries of B requests, packed request by request. Queries that belong to no request are ignored."""

    q: torch.Tensor  # [Tq, H, D]
    starts: torch.Tensor  # [B] or longer: where each request's queries start
    ends: torch.Tensor  # [B] where they end
    lam: float  # weight of the spread
    reduce: str  # "max", "mean" or "softmax_sum", over the queries of a request and the heads of a key head
    voters: torch.Tensor | None = None  # [Tq] bool; None: all
    sharpness: float = 1.0  # factor applied to the queries
