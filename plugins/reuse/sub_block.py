"""Fast-dLLM v2's block cache: only recomputes the current sub-block of a canvas block.

https://arxiv.org/abs/2509.26328. The whole block is recomputed in its first step and
while the first position of the sub-block is a mask, otherwise only the sub-block.
In models with full attention, a block begins with a full forward, as in
`fast_dllm`. Sub-blocks begin at multiples of their width.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from vllm_dlm.plugins.decoding.base import check
from vllm_dlm.plugins.reuse.base import Progress, StepPlan, span
from vllm_dlm.plugins.reuse.fast_dllm import BlockCache
from vllm_dlm.plugins.reuse.roles import WithinBlocks


@dataclass(frozen=True)
class SubBlock(WithinBlocks, BlockCache):
    name: ClassVar[str] = "sub_block"

    length: int = 8

    def __post_init__(self):
        check(self.length >= 1, "length", self.length, "at least 1")

    @property
    def layer_key(self) -> Hashable:
        return BlockCache

    def plan(self, at: Progress) -> StepPlan:
        whole = super().plan(at)
        if whole.refresh or (rows := self.inside(at)) is None:
            return whole
        return StepPlan.dense(span(*rows))

    def inside(self, at: Progress) -> tuple[int, int] | None:
        start, end = at.block
        masked = at.masked[at.masked >= start]
        first = int(masked[0]) // self.length * self.length if len(masked) else start
        if not len(masked) or at.tokens[first] == at.mask_id:
            return None
        return first, min(first + self.length, end)
