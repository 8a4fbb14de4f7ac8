"""dLLM-Var's cache: keeps the keys and values of a finished canvas block from the step after it.

https://arxiv.org/abs/2510.24605. The first step of a block recomputes the new block
and the previous one, which never changes again. Later steps only recompute the
current block. Prompt rows are computed once, with the first block. The reference
uses `extent: block`.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from vllm_dlm.plugins.reuse.base import Progress, Reuse, StepPlan, span
from vllm_dlm.plugins.reuse.fast_dllm import BlockCache
from vllm_dlm.plugins.reuse.flow import Flow, Layer, cached, dense


@dataclass(frozen=True)
class Frozen(Reuse):
    name: ClassVar[str] = "frozen"
    #: a preempted request may return other tokens: its cached keys come from steps that cannot be repeated
    begins_again: ClassVar[bool] = False

    @property
    def layer_key(self) -> Hashable:
        return BlockCache

    def plan(self, at: Progress) -> StepPlan:
        if at.cold and not at.grown:
            return StepPlan.dense(span(0, at.length), refresh=True)
        start, end = at.block
        if at.block_step == 0:
            start, end = at.block_before, max(end, at.length if at.grown else end)
        return StepPlan.dense(span(max(start - at.shift, 0), end))

    def layer(self, at: Layer) -> Flow:
        return dense(at) if at.whole else cached(at)
