"""Models whose attention knows blocks: a row sees its own block and all before it, so what is finished never changes.

Blocks lie at multiples of their width from the first token on, prompt
included. A step recomputes the block that is being filled, and beside it once
what has become final: the prompt's whole blocks at the start, later the block
that has just been finished. Their rows see no farther than to the end of their
own block, whose keys and values stay from then on. That is the exact model.

A long prompt is read in several steps, which fill nothing yet.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vllm_dlm.plugins.extent.base import Extent
from vllm_dlm.plugins.reuse.base import Progress, Reuse, StepPlan, span
from vllm_dlm.plugins.reuse.flow import Flow, Layer, cached

#: rows of a prompt that are read in one step, at most, as far as whole blocks go
CHUNK = 1024


@dataclass(frozen=True)
class BlockCausal(Reuse):
    name: ClassVar[str] = "none"  # nothing but the model itself

    width: int = 0  # of a block

    @property
    def layer_key(self) -> Hashable:
        return BlockCausal

    def final(self, at: Progress) -> int:
        """Of the block that is being filled nothing, until it is finished."""
        return at.block[0] // self.width * self.width

    def written(self, at: Progress) -> int:
        return min(self.final(at), at.written + max(CHUNK // self.width, 1) * self.width)

    def reads(self, at: Progress) -> bool:
        return self.written(at) == self.final(at)

    def plan(self, at: Progress) -> StepPlan:
        return StepPlan.dense(span(at.written, at.block[1] if self.reads(at) else self.written(at)))

    def sights(self, live: np.ndarray) -> list[tuple[np.ndarray, int]]:
        starts = range(int(live[0]), int(live[-1]) + 1, self.width)
        return [(span(start, start + self.width), start + self.width) for start in starts]

    def candidates(self, positions: np.ndarray, at: Progress) -> np.ndarray:
        if not self.reads(at):
            return positions[:0]
        return positions[positions >= max(at.block[0], at.prompt_len)]

    def layer(self, at: Layer) -> Flow:
        return cached(at)


@dataclass(frozen=True)
class Committed(Extent):
    """What no block sees has no row, and no memory."""

    name: ClassVar[str] = "full"
    grows: ClassVar[bool] = True

    def rows(self, end: int, length: int) -> int:
        return end
