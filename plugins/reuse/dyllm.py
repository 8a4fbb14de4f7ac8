"""DyLLM: recomputes only rows whose attention context changed.

https://arxiv.org/abs/2603.08026. After `full_steps` full forwards, a step
recomputes keys and values of salient rows only. All live rows still attend, but
a row that is not salient only adds the contribution of changed values to its
cached context (`delta_v`). A row becomes salient if the cosine between its new
and its old context is below `threshold`. It then passes the FFN of this layer
and gets new keys and values in the next. In the first layer, the rows with new
tokens are salient.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_dlm.plugins.decoding.base import check
from vllm_dlm.plugins.reuse.base import Progress, Reuse, RowShape, StepPlan, span
from vllm_dlm.plugins.reuse.flow import Attend, AttendMoved, FeedForward, Flow, Layer, Output, dense, heads

#: constant of the official code: prompt rows are live in the first four steps and in every fourth step
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
    # Interval of steps in which prompt rows are live, too; 0: never, and they need no features. None: 4 as in the
    # official code with `parity`, else 16. With a long prompt, attention makes such a step nearly as expensive as a
    # dense one, and `python -m benchmarks quality` finds no difference between 0 and 16.
    whole_interval: int | None = None
    refresh_interval: int = 0  # drift control: interval of full forwards; 0: never again, as published
    parity: bool = False  # reproduces the official code: rows of new tokens are salient in the first layer only
    stagger: bool = True  # spread refreshes of different requests over the steps

    def __post_init__(self):
        check(self.full_steps >= 1, "full_steps", self.full_steps, "at least 1")
        check((self.whole_interval or 0) >= 0, "whole_interval", self.whole_interval, "at least 0")
        check(self.refresh_interval >= 0, "refresh_interval", self.refresh_interval, "at least 0")

    def plan(self, at: Progress) -> StepPlan:
        everything = span(0, at.length)
        drifted = self.refresh_interval and at.step % self.refresh_interval == 0
        if at.cold or at.step < self.full_steps or drifted:
            return StepPlan.dense(everything, refresh=True)
        step = at.step + 1  # the official code counts from 1
        interval = self._interval
        whole = interval and (step % interval == 0 or step <= OFFICIAL_INTERVAL)
        live = everything if whole else span(*at.response)
        forced = span(at.response[0], at.prompt_len)  # Dream's row before the response
        return StepPlan(live, forced, None, len(live), refresh=bool(whole), force_changed=not self.parity)

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
    def layer_key(self) -> Hashable:
        return DyLLM, self.threshold

    def layer(self, at: Layer) -> Flow:
        return dense(at, kept) if at.whole else self._salient(at)

    def _salient(self, at: Layer) -> Flow:
        """All live rows attend. For a row that is not salient, only the changed values are added to its cached
        context."""
        columns = at.columns
        if at.index == 0:
            # A cached context is a sum over the keys visible then. If the visible keys change, it is recomputed.
            always_T = columns.forced | columns.fresh
            columns.carried["salient"] = always_T | columns.changed
            columns.carried["limit"] = torch.where(always_T, torch.inf, self.threshold)
        salient_T, limit_T = columns.carried["salient"], columns.carried["limit"]
        changed = at.where(salient_T, at.all)
        # Outputs of prompt rows in the last layer are unused.
        rows = at.response if at.last else at.all
        exact = at.where(salient_T, rows) if at.last else changed

        before = at.cached_values(changed.rows)
        q, _, v = yield from heads(at, rows, changed.rows)
        old, ffn = at.features(rows).split([q.shape[1] * q.shape[2], at.x.shape[1]], 1)
        context = old + (yield AttendMoved(q, rows, changed.rows, v - before, exact))
        context = exact.set(context, (yield Attend(exact.gather(q), exact.rows)))

        salient_T = rows.set(salient_T, at.similarity(context, old) < rows.gather(limit_T))
        columns.carried["salient"] = salient_T
        salient = at.where(salient_T, rows)
        output = yield Output(context)
        x, new = yield FeedForward(rows.gather(at.x), output, salient)
        ffn = salient.set(ffn, new)
        at.keep(rows, kept(context, output, ffn))
        return rows, x, ffn


def kept(context: torch.Tensor, output: torch.Tensor, ffn: torch.Tensor) -> torch.Tensor:
    """Features of a row: the context before its projection and the FFN output, [n, H * D + E]"""
    return torch.cat([context, ffn], 1)
