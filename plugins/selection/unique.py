"""UNIQUE: a query reads the highest-scored pages of the cache.

A page's score is the product of the query with the mean of its keys, plus the
spread of its keys times the length of the query. The mean alone would hide a
single important key, which the spread makes up for (`kernels/page_scores`).
Works after training, on autoregressive models and on the cached prompt of
diffusion models.

The method is known only from its abstract and from notes on it. Page size,
forced pages, the reduction over grouped heads and the kind of spread are this
project's interpretation. Each is a field.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_dlm.kernels.haar_pyramid import (
    PageStatistics,
    StdKind,
    mean_and_variance,
    spread_of,
    spread_width,
    store_statistics,
)
from vllm_dlm.kernels.page_scores import Reduction, page_scores
from vllm_dlm.plugins.decoding.base import check
from vllm_dlm.plugins.selection.base import ChoiceQuery, Summaries
from vllm_dlm.plugins.selection.pages import PageSelection


@dataclass(frozen=True)
class Unique(PageSelection):
    name: ClassVar[str] = "unique"

    lam: float = 0.5  # weight of the spread
    std_kind: StdKind = "l2"
    # over the query heads of a key head and the queries of a step
    reduce: Reduction = "max"

    def __post_init__(self):
        super().__post_init__()
        check(self.lam >= 0, "lam", self.lam, "at least 0")

    def vectors(self, dim: int, dtype: torch.dtype) -> tuple[tuple[int, torch.dtype], tuple[int, torch.dtype]]:
        return (dim, dtype), (spread_width(self.std_kind, dim), torch.float32)

    def describe(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, variance = mean_and_variance(keys)  # [n, Hkv, D]
        return mean, spread_of(variance, self.std_kind)

    def scores(self, asked: ChoiceQuery) -> torch.Tensor:
        queries = asked.scoring(self.query_set, self.lam, self.reduce)
        marks = asked.counts, self.forced_from(asked), self.sink_pages
        return page_scores(queries, self._statistics(asked.summaries), asked.table, *marks)

    def store(self, cache: torch.Tensor, page_ids: torch.Tensor, summaries: Summaries) -> None:
        store_statistics(cache, page_ids, self._statistics(summaries))

    def _statistics(self, given: Summaries) -> PageStatistics:
        return PageStatistics(*given.by_place(), self.page_size, self.std_kind)
