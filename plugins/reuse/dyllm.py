"""DyLLM: only rows whose attention context moved are recomputed.

https://arxiv.org/abs/2603.08026. After `full_steps` full forwards, a step
recomputes keys and values of the salient rows only; all live rows still
attend, but a row that is not salient just adds what the moved values change
(`delta_v`). A row whose new context has a cosine below `threshold` with its
old one becomes salient: it passes the FFN of this layer and gets new keys and
values in the next. The first layer's salient rows are those with new tokens.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_dlm.plugins.decoding.base import check
from vllm_dlm.plugins.reuse.base import Progress, Reuse, RowShape, StepPlan, span
from vllm_dlm.plugins.reuse.flow import Attend, AttendMoved, FeedForward, Flow, Layer, Output, dense, heads

#: the official code's constant: every fourth step, and the first four, let the prompt's rows live
OFFICIAL_INTERVAL = 4


@dataclass(frozen=True)
class DyLLM(Reuse):
    name: ClassVar[str] = "dyllm"
    presets: ClassVar[dict[str, dict]] = {
        "llada-quality": {"threshold": 0.995, "whole_interval": OFFICIAL_INTERVAL},
        "llada-speed": {"threshold": 0.99, "whole_interval": OFFICIAL_INTERVAL},
        "dream-quality": {"threshold": 0.9975, "whole_interval": OFFICIAL_INTERVAL},
        "dream-speed": {"threshold": 0.995, "whole_interval": OFFICIAL_INTERVAL},
    }
    exact: ClassVar[dict] = {"refresh_interval": 1}
    keeps_contexts: ClassVar[bool] = True

    full_steps: int = 4
    threshold: float = 0.995  # tau
    # Every so many steps the prompt's rows live, too; 0: never, and they need no features. Null: the official
    # code's 4 in parity mode, else 16: a long prompt's attention makes each such step cost nearly a dense one, and
    # `python -m benchmarks quality` finds no difference between 0 and 16.
    whole_interval: int | None = None
    refresh_interval: int = 0  # drift control: a full forward every so many steps; 0: never again, as published
    parity: bool = False  # exactly the official code: rows of new tokens are salient in the first layer only
    stagger: bool = True  # refreshes of different requests are spread over the steps

    def __post_init__(self):
        check(self.full_steps >= 1, "full_steps", self.full_steps, "at least 1")
        check((self.whole_interval or 0) >= 0, "whole_interval", self.whole_interval, "at least 0")
        check(self.refresh_interval >= 0, "refresh_interval", self.refresh_interval, "at least 0")

    def plan(self, at: Progress) -> StepPlan:
        everything = span(0, at.length)
        drifted = self.refresh_interval and at.step % self.refresh_interval == 0
        if at.cold or at.step < self.full_steps or drifted:
            return StepPlan.dense(everything, refresh=True)
        step = at.step + 1  # the official code counts from 1, and its first four are whole
        interval = self._interval
        whole = interval and (step % interval == 0 or step <= OFFICIAL_INTERVAL)
        live = everything if whole else span(*at.response)
        forced = span(at.response[0], at.prompt_len)  # Dream's row before the response
        return StepPlan(live, forced, None, len(live), refresh=bool(whole))

    def feature_rows(self, prompt_len: int, length: int) -> int:
        return length if self._interval else length - prompt_len

    def feature_width(self, row: RowShape) -> int:
        return row.context + row.hidden

    @property
    def _interval(self) -> int:
        if self.whole_interval is None:
            return OFFICIAL_INTERVAL if self.parity else 4 * OFFICIAL_INTERVAL
        return self.whole_interval

    @property
    def force_changed(self) -> bool:
        return not self.parity

    @property
    def layer_key(self) -> Hashable:
        return DyLLM, self.threshold

    def layer(self, at: Layer) -> Flow:
        return dense(at, kept) if at.whole else self._salient(at)

    def _salient(self, at: Layer) -> Flow:
        """All rows attend; where a row is not salient, only the moved values are added to its cached context."""
        columns = at.columns
        if at.index == 0:
            # A context is the sum over what was visible: where that changes, it is made anew.
            always_T = columns.forced | columns.fresh
            columns.carried["salient"] = always_T | columns.changed
            columns.carried["limit"] = torch.where(always_T, torch.inf, self.threshold)
        salient_T, limit_T = columns.carried["salient"], columns.carried["limit"]
        changed = at.where(salient_T, at.all)
        # What the prompt's rows become in the last layer is read by nobody.
        rows = at.response if at.last else at.all
        exact = at.where(salient_T, rows) if at.last else changed

        before = at.cached_values(changed.rows)
        q, _, v = yield from heads(at, rows, changed.rows)
        old, ffn = at.features(rows).split([q.shape[1] * q.shape[2], at.x.shape[1]], 1)
        context = old + (yield AttendMoved(q, rows, changed.rows, v - before))
        context = exact.set(context, (yield Attend(exact.of(q), exact.rows)))

        salient_T = rows.set(salient_T, at.similarity(context, old) < rows.of(limit_T))
        columns.carried["salient"] = salient_T
        salient = at.where(salient_T, rows)
        output = yield Output(context)
        x, new = yield FeedForward(rows.of(at.x), output, salient)
        ffn = salient.set(ffn, new)
        at.keep(rows, kept(context, output, ffn))
        return rows, x, ffn


def kept(context: torch.Tensor, output: torch.Tensor, ffn: torch.Tensor) -> torch.Tensor:
    """The context before its projection, and the FFN's output: [n, H * D + E]"""
    return torch.cat([context, ffn], 1)
