"""Fast-dLLM: keys and values outside the current block are frozen while the block is denoised.

https://arxiv.org/abs/2505.22618. Each block starts with a full forward, which
also fills its first positions. Later steps recompute the block and all
positions after it (`prefix`) or the block alone (`dual`).
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from vllm_dlm.plugins.reuse.base import Progress, Reuse, StepPlan, span
from vllm_dlm.plugins.reuse.flow import Flow, Layer, cached, dense


@dataclass(frozen=True)
class BlockCache(Reuse):
    """Each block starts with a full forward, later steps only recompute the block."""

    stagger: bool = True  # spread refreshes of different requests over the steps

    def plan(self, at: Progress) -> StepPlan:
        if at.cold or at.block_step == 0:
            return StepPlan.dense(span(0, at.length), refresh=True)
        return StepPlan.dense(span(*at.block))

    def due(self, positions: np.ndarray, at: Progress) -> np.ndarray | None:
        if at.shift and at.block_step == 0:
            # Dream reads position p at row p - 1. The row of a block's first position is not live in later steps,
            # so the full forward fills this position, and only this one.
            return positions[positions == at.block[0]]
        return None

    def layer(self, at: Layer) -> Flow:
        return dense(at) if at.whole else cached(at)


@dataclass(frozen=True)
class FastDLLM(BlockCache):
    name: ClassVar[str] = "fast_dllm"
    presets: ClassVar[dict[str, dict]] = {"prefix": {"cache": "prefix"}, "dual": {"cache": "dual"}}

    cache: Literal["prefix", "dual"] = "dual"

    @property
    def block_alone(self) -> bool:
        return self.cache == "dual"

    @property
    def layer_key(self) -> Hashable:
        return BlockCache

    def plan(self, at: Progress) -> StepPlan:
        plan = super().plan(at)
        if plan.refresh or self.cache == "dual":
            return plan
        return StepPlan.dense(span(at.block[0], at.length))
