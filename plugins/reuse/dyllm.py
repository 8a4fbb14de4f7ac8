"""DyLLM: only rows whose attention context moved are recomputed.

https://arxiv.org/abs/2603.08026. After `full_steps` full forwards, a step
recomputes keys and values of the salient rows only; all live rows still
attend, but a row that is not salient just adds what the moved values change
(`delta_v`). A row whose new context has a cosine below `threshold` with its
old one becomes salient: it passes the FFN of this layer and gets new keys and
values in the next. The first layer's salient rows are those with new tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_dlm.plugins.decoding.base import check
from vllm_dlm.plugins.reuse.base import LayerRows, Progress, Reuse, StepPlan

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
    features: ClassVar[str] = "context_ffn"
    attention: ClassVar[str] = "delta_v"
    selects: ClassVar[str | None] = "contexts"

    full_steps: int = 4
    threshold: float = 0.995  # tau
    # Every so many steps the prompt's rows live, too; 0: never, and they need no features. Null: the official
    # code's 4 in parity mode, else 16: a long prompt's attention makes each such step cost nearly a dense one, and
    # `python -m benchmarks quality` finds no difference between 0 and 16.
    whole_interval: int | None = None
    refresh_interval: int = 0  # drift control: a full forward every so many steps; 0: never again, as published
    parity: bool = False  # exactly the official code: rows of new tokens are salient in the first layer only
    stagger: bool = True  # refreshes of different requests do not share a forward

    def __post_init__(self):
        check(self.full_steps >= 1, "full_steps", self.full_steps, "at least 1")
        check((self.whole_interval or 0) >= 0, "whole_interval", self.whole_interval, "at least 0")
        check(self.refresh_interval >= 0, "refresh_interval", self.refresh_interval, "at least 0")

    def plan(self, at: Progress) -> StepPlan:
        everything = (0, at.length)
        drifted = self.refresh_interval and at.step % self.refresh_interval == 0
        if at.cold or at.step < self.full_steps or drifted:
            return StepPlan.dense(everything, refresh=True)
        step = at.step + 1  # the official code counts from 1, and its first four are whole
        interval = self._interval
        whole = interval and (step % interval == 0 or step <= OFFICIAL_INTERVAL)
        live = everything if whole else at.response
        forced = (at.response[0], at.prompt_len)  # Dream's row before the response
        return StepPlan(live, forced, None, live[1] - live[0], refresh=bool(whole))

    def feature_rows(self, prompt_len: int, length: int) -> int:
        return length if self._interval else length - prompt_len

    @property
    def _interval(self) -> int:
        if self.whole_interval is None:
            return OFFICIAL_INTERVAL if self.parity else 4 * OFFICIAL_INTERVAL
        return self.whole_interval

    @property
    def force_changed(self) -> bool:
        return not self.parity

    def select_post(self, rows: LayerRows, similarity_T: torch.Tensor) -> torch.Tensor:
        return rows.forced | (similarity_T < self.threshold)
