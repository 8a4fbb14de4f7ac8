"""d3LLM's delayed cache: finished blocks are frozen some steps after their last token was filled.

https://arxiv.org/abs/2601.07568. Blocks are counted from the end of the prompt, which
is a block that is finished at the start. A finished block is frozen `delay` steps after
the first step that finds it finished. While one waits, every row is recomputed. The
step that freezes it recomputes the rows from its start on, later ones those from its
end on.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from vllm_dlm.plugins.decoding.base import check
from vllm_dlm.plugins.reuse.base import Progress, Reuse, StepPlan, span
from vllm_dlm.plugins.reuse.fast_dllm import BlockCache
from vllm_dlm.plugins.reuse.flow import Flow, Layer, cached, dense


@dataclass(frozen=True)
class Delayed(Reuse):
    name: ClassVar[str] = "delayed"
    presets: ClassVar[dict[str, dict]] = {
        "llada": {},
        "llada-gsm8k": {"refresh_interval": 3},
        "llada-humaneval": {"refresh_interval": 4},
        "dream": {"in_turn": False},
        "dream-coder": {"delay": 32, "in_turn": False},
    }
    exact: ClassVar[dict] = {"delay": 1 << 30}
    #: a preempted request may return other tokens: its frozen keys come from steps that cannot be repeated
    begins_again: ClassVar[bool] = False

    length: int = 32  # positions of a block
    delay: int = 1
    refresh_interval: int = 0  # interval of full forwards; 0: none but those of finished blocks
    in_turn: bool = True  # the delay of a block begins once the block before it is frozen

    def __post_init__(self):
        check(self.length >= 1, "length", self.length, "at least 1")
        check(self.delay >= 1, "delay", self.delay, "at least 1")
        check(self.refresh_interval >= 0, "refresh_interval", self.refresh_interval, "at least 0")

    @property
    def layer_key(self) -> Hashable:
        return BlockCache

    def plan(self, at: Progress) -> StepPlan:
        now, frozen, freezes, waits = at.step + 1, 0, False, False
        for end, due in self._finished(at):
            frozen = end if due < now else frozen
            freezes |= due == now
            waits |= due > now
        refresh = waits or bool(self.refresh_interval and now % self.refresh_interval == 0)
        if at.cold or (refresh and not freezes):
            return StepPlan.dense(span(0, at.length), refresh=True)
        return StepPlan.dense(span(max(frozen - at.shift, 0), at.length))

    def _finished(self, at: Progress) -> list[tuple[int, int]]:
        """End of each finished block before the first unfinished one, and the step that freezes it, counted from 1"""
        found, start, end, clock = [], 0, at.prompt_len, 0
        while start < at.length and not (at.tokens[start:end] == at.mask_id).any():
            last = int(at.filled_at[start:end].max(initial=0))
            clock = max(clock, last + 1 if last else 0)
            found.append((end, clock + self.delay))
            if self.in_turn:
                clock += self.delay
            start, end = end, min(end + self.length, at.length)
        return found

    def layer(self, at: Layer) -> Flow:
        return dense(at) if at.whole else cached(at)
