"""UNIQUE: a query reads the pages of the cache whose keys promise most.

A page's promise is the mean of its keys seen by the query, plus the spread of
its keys times the length of the query: averaging hides a single important key,
and the spread gives it back (`kernels/page_scores`). Works after training, on
autoregressive models and on the cached prompt of diffusion models; pages of a
diffusion model's response are always read.

The method is known from its abstract and notes on it: page size, forced pages,
the reduction over grouped heads and which scalar the spread is are this
project's reading, and fields.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vllm_dlm.kernels.haar_pyramid import STD_KINDS
from vllm_dlm.kernels.page_scores import REDUCTIONS
from vllm_dlm.plugins.decoding.base import check
from vllm_dlm.plugins.selection.base import Selection


@dataclass(frozen=True)
class Unique(Selection):
    name: ClassVar[str] = "unique"
    autoregressive: ClassVar[bool] = True

    budget_tokens: int = 2048  # read per query and key head, sink and recent pages included
    page_size: int = 64  # a power of two that divides the KV block
    lam: float = 0.5  # weight of the spread
    std_kind: Literal[STD_KINDS] = "l2"
    reduce: Literal[REDUCTIONS] = "max"  # over the heads of a key head, and over the queries of a step
    sink_pages: int = 1  # the first ones are always read
    recent_pages: int = 2  # and the last ones
    min_context: int = 8192  # shorter ones are read whole
    dense_layers: tuple[int, ...] = (0, 1)  # these layers read everything

    def __post_init__(self):
        size = self.page_size
        check(16 <= size <= 128 and size & (size - 1) == 0, "page_size", size, "16, 32, 64 or 128")
        check(self.lam >= 0, "lam", self.lam, "at least 0")
        check(self.sink_pages >= 0, "sink_pages", self.sink_pages, "at least 0")
        check(self.recent_pages >= 1, "recent_pages", self.recent_pages, "at least 1: the last page may be unfinished")
        check(self.min_context >= 0, "min_context", self.min_context, "at least 0")
        least = (self.sink_pages + self.recent_pages + 1) * size
        check(
            self.budget_tokens >= least, "budget_tokens", self.budget_tokens,
            f"at least {least}: the sink and recent pages and one to choose",
        )  # fmt: skip

    @property
    def budget_pages(self) -> int:
        return self.budget_tokens // self.page_size
