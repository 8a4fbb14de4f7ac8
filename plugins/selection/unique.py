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

import torch

from vllm_dlm.kernels.haar_pyramid import STD_KINDS, runs_of, spread_of, spread_width
from vllm_dlm.kernels.page_scores import REDUCTIONS, run_scores
from vllm_dlm.kernels.top_pages import top_pages
from vllm_dlm.plugins.decoding.base import check
from vllm_dlm.plugins.selection.base import Asked, Choice, Selection


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
    query_set: Literal["active", "masked"] = "masked"  # who chooses for a step: all its rows, or those to be decided
    select_every: int = 1  # denoising steps that a choice serves; a refresh of the prompt ends it before

    def __post_init__(self):
        size = self.page_size
        check(16 <= size <= 128 and size & (size - 1) == 0, "page_size", size, "16, 32, 64 or 128")
        check(self.lam >= 0, "lam", self.lam, "at least 0")
        check(self.sink_pages >= 0, "sink_pages", self.sink_pages, "at least 0")
        check(self.recent_pages >= 1, "recent_pages", self.recent_pages, "at least 1: the last page may be unfinished")
        check(self.min_context >= 0, "min_context", self.min_context, "at least 0")
        check(self.select_every >= 1, "select_every", self.select_every, "at least 1")
        least = (self.sink_pages + self.recent_pages + 1) * size
        check(
            self.budget_tokens >= least, "budget_tokens", self.budget_tokens,
            f"at least {least}: the sink and recent pages and one to choose",
        )  # fmt: skip

    @property
    def budget_pages(self) -> int:
        return self.budget_tokens // self.page_size

    # -- the prompt of a diffusion model ---------------------------------------------------

    @property
    def unit(self) -> int:
        return self.page_size

    def applies(self, prompt_len: int, length: int) -> bool:
        return length >= self.min_context and prompt_len // self.page_size > self.budget_pages

    def summary_rows(self, prompt_len: int) -> int:
        return prompt_len // self.page_size

    def summarise(self, keys: torch.Tensor) -> torch.Tensor:
        mean, variance = runs_of(keys, self.page_size)  # [R, Hkv, D]
        spread = spread_of(variance, self.std_kind)
        row = torch.zeros(*mean.shape[:2], 2 * mean.shape[2], dtype=keys.dtype, device=keys.device)
        row[..., : mean.shape[2]] = mean
        row[..., mean.shape[2] :][..., : spread.shape[2]] = spread
        return row

    def choose(self, asked: Asked) -> Choice:
        mean, spread = asked.summary.chunk(2, -1)  # [Hkv, R, D]
        spread = spread[..., : spread_width(self.std_kind, mean.shape[2])]
        # The prompt's end counts as recent. Its unfinished page is read anyway.
        forced_from = max(0, -(-asked.prompt_len // self.page_size) - self.recent_pages)
        scores = run_scores(
            asked.electing(self.query_set),
            mean,
            spread,
            self.std_kind,
            forced_from,
            self.sink_pages,
            self.lam,
            self.reduce,
        )  # [1, Hkv, R]
        count = mean.shape[1]
        return Choice(top_pages(scores, min(self.budget_pages, count))[0], count)

    def keeps(self, steps: int) -> bool:
        return steps % self.select_every != 0
