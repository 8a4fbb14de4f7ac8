"""Every row of every layer is recomputed at every step: the exact model."""

from dataclasses import dataclass
from typing import ClassVar

from vllm_dlm.plugins.reuse.base import Progress, Reuse, StepPlan, span
from vllm_dlm.plugins.reuse.flow import Flow, Layer, dense


@dataclass(frozen=True)
class Dense(Reuse):
    name: ClassVar[str] = "none"
    exact: ClassVar[dict] = {}
    caches: ClassVar[bool] = False

    def plan(self, at: Progress) -> StepPlan:
        return StepPlan.dense(span(0, at.length))

    def layer(self, at: Layer) -> Flow:
        return dense(at)
