"""UNIQUE with a second look: the best pages by mean and spread are candidates, whose keys are then scored one by one.

On a real model the exact best pages lose almost nothing, and what pages lose
otherwise is lost by their score (`python -m benchmarks real`). `candidates`
times as many pages as are read pass UNIQUE's score. Their attention
weights, summed over the queries and heads that choose together, decide. What the
second look reads does not grow with the context.

It is not part of the published method.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_dlm.kernels.page_scores import half_scores
from vllm_dlm.kernels.top_pages import store_top_pages, top_pages
from vllm_dlm.plugins.decoding.base import check
from vllm_dlm.plugins.selection.base import Choice, ChoiceQuery
from vllm_dlm.plugins.selection.unique import Unique


@dataclass(frozen=True)
class SecondLook(Unique):
    name: ClassVar[str] = "second_look"

    candidates: int = 2  # pages that are looked at twice, as a multiple of those that are read

    def __post_init__(self):
        super().__post_init__()
        check(self.candidates >= 1, "candidates", self.candidates, "at least 1")

    def choose(self, asked: ChoiceQuery) -> Choice:
        first = self.scores(asked)  # [B, Hkv, N]
        batch, _, count = first.shape
        prompts = asked.prompts
        # the page that a generated position fills is always read, so it is not chosen
        kept = min(self.kept_pages - (prompts is None), count)
        pages = top_pages(first, min(self.candidates * kept, count))  # [B, Hkv, C]
        shares = self._second(asked, pages)  # [B, Hkv, C]
        scored = batch * (count + pages.shape[2] * self.page_size)
        held = None if prompts is None else prompts.held
        if held is None:
            return Choice(top_pages(shares, kept, names=pages), scored)
        store_top_pages(held.units, held.rows, shares, kept, names=pages)
        return Choice(None, scored)

    def _second(self, asked: ChoiceQuery, pages: torch.Tensor) -> torch.Tensor:
        """Attention weights of the keys of pages [B, Hkv, C], summed; forced pages are ahead of all others"""
        size, queries = self.page_size, asked.scoring(self.query_set, 0.0, "softmax_sum")
        pair = torch.arange(size // 2, dtype=pages.dtype, device=pages.device)
        runs = (pages[..., None] * (size // 2) + pair).masked_fill(pages[..., None] < 0, -1).flatten(2)
        counts = asked.counts.clamp_max(pages.shape[2])  # candidates of each chooser
        recent = (asked.counts - self.forced_from(asked)).clamp_min(0)
        sinks = asked.counts.clamp_max(self.sink_pages)
        tokens, _ = half_scores(queries, *asked.cached, runs, 1, (counts - recent) * size, sinks * size)
        return tokens.unflatten(2, (-1, size)).sum(3)
