"""A reuse policy that lives outside of the package, with a flow and features of its own.

As dKV-Cache has it (https://arxiv.org/abs/2505.15781), the keys and values of
a token are cached one step after it was filled in: masked rows and rows of the
last step's tokens live, all others are read from the cache. Of its own
making: a row keeps what the FFN saw and said, and asks again where that moved.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_dlm.plugins.decoding.base import check
from vllm_dlm.plugins.reuse.base import Progress, Reuse, RowShape, StepPlan, joined, span
from vllm_dlm.plugins.reuse.flow import Attend, FeedForward, Flow, Layer, Output, QueryKeyValue


@dataclass(frozen=True)
class DelayedCache(Reuse):
    name: ClassVar[str] = "delayed_cache"
    exact: ClassVar[dict] = {"refresh_interval": 1}

    refresh_interval: int = 8
    threshold: float = 0.99

    def __post_init__(self):
        check(self.refresh_interval >= 1, "refresh_interval", self.refresh_interval, "at least 1")

    def plan(self, at: Progress) -> StepPlan:
        if at.cold or at.step % self.refresh_interval == 0:
            return StepPlan.dense(span(0, at.length), refresh=True)
        live = joined(at.masked, at.rows_reading(at.masked), at.changed)
        return StepPlan(live, live[live < at.prompt_len], None, len(live), refresh=False)

    def feature_rows(self, prompt_len: int, length: int) -> int:
        return length - prompt_len

    def feature_width(self, row: RowShape) -> int:
        return 2 * row.hidden

    def layer(self, at: Layer) -> Flow:
        q, k, v = yield QueryKeyValue(at.h, at.all)
        context = yield (Attend(q, at.all, k, v) if at.whole else Attend(q, at.all))
        output = yield Output(context)
        seen, said = at.features(at.all).chunk(2, 1)
        x = at.x + output
        picked = None
        if not at.whole:
            moved_T = at.similarity(x, seen) < self.threshold
            picked = at.where(at.columns.forced | at.columns.changed | moved_T, at.all)
        _, new = yield FeedForward(x, picked=picked)
        seen, said = (x, new) if picked is None else (picked.set(seen, picked.gather(x)), picked.set(said, new))
        at.keep(at.all, torch.cat([seen, said], 1))
        return at.all, x, said
