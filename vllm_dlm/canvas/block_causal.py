"""Block-causal models: a row attends to its own canvas block and to all blocks before it.

Finished blocks therefore never change. Blocks are counted from the first token of the prompt. A block that ends at the
model's length may be shorter. A step recomputes the block that is being filled, and computes each block once more when
it becomes final: the whole blocks of the prompt at the start, later the block that was just finished. Each row attends
to the end of its own block, so a step has one stream per block, as if the canvas ended there. Output is exact. A long
prompt is computed in several steps that fill nothing.

If logits predict the next position, the last row of a final block predicts the first position of the block after it.
The step that recomputes the final block then reads only that position. The next step begins the new block.

With a selection, the current block attends to part of the final positions (`_keys`).
"""

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from vllm_dlm.canvas.commit import NOTHING
from vllm_dlm.canvas.feature import Feature, Room
from vllm_dlm.canvas.selected_keys import SelectedKeys
from vllm_dlm.canvas.stream import Reading, Stream
from vllm_dlm.options import Options
from vllm_dlm.plugins.extent.base import Extent
from vllm_dlm.plugins.reuse.base import Progress, Reuse, StepPlan, span
from vllm_dlm.plugins.reuse.flow import Flow, Layer, cached
from vllm_dlm.plugins.reuse.roles import WithinBlocks

if TYPE_CHECKING:
    from vllm_dlm.canvas.canvas import Canvas
    from vllm_dlm.canvas.denoising import Denoising

#: maximum number of prompt rows computed in one step, rounded down to whole blocks
CHUNK = 1024


@dataclass(frozen=True)
class BlockCausal(Reuse):
    """The only reuse policy of these models. Final positions are computed once."""

    name: ClassVar[str] = "none"

    width: int = 0  # canvas block length
    policy: Reuse = field(default_factory=Reuse)  # selects the recomputed rows of the current block

    @property
    def layer_key(self) -> Hashable:
        return BlockCausal

    def final(self, at: Progress) -> int:
        """Length of the prefix whose keys and values can no longer change, written or not"""
        return at.block[0] // self.width * self.width

    def written(self, at: Progress) -> int:
        """Length of the prefix whose keys and values are cached after this step and can no longer change"""
        return min(self.final(at), at.written + max(CHUNK // self.width, 1) * self.width)

    def reads(self, at: Progress) -> bool:
        """Whether this step reads logits of the current block. Other steps do not count as steps of the block."""
        return self.written(at) == self.final(at)

    def predicted_before(self, at: Progress) -> bool:
        """Whether the first position of the block is a mask that a row of the previous block predicts"""
        start = at.block[0]
        return bool(at.shift) and start == self.final(at) and at.tokens[start] == at.mask_id

    def due(self, positions: np.ndarray, at: Progress) -> np.ndarray | None:
        return positions[positions == at.block[0]] if self.predicted_before(at) else None

    def plan(self, at: Progress) -> StepPlan:
        if not self.reads(at) or self.predicted_before(at):
            return StepPlan.dense(span(at.written, self.written(at)))
        seeded = bool(at.shift) and at.block[0] == self.final(at)  # the previous step had no rows of the block
        begun = at.written == self.final(at) and at.block_step > seeded
        rows = self.policy.inside(at) if begun and isinstance(self.policy, WithinBlocks) else None
        if rows is None:
            return StepPlan.dense(span(at.written, at.block[1]))
        return StepPlan.dense(span(max(rows[0], at.written), rows[1]))  # final rows are not computed again

    def parts(self, at: Progress, live: np.ndarray) -> list[tuple[np.ndarray, int]]:
        """Live rows of each block, and the end of the block. These rows attend to all positions before the end."""
        start, last = int(live[0]), int(live[-1]) + 1
        if start > at.written:
            return [(live, at.block[1])]  # rows of the current block
        ends = [*range(start + self.width, last, self.width), last]
        return [(span(*each), at.block[1] if each[1] > at.block[0] else each[1]) for each in pairwise([start, *ends])]

    def layer(self, at: Layer) -> Flow:
        return cached(at)


@dataclass(frozen=True)
class CommittedExtent(Extent):
    """Positions after the current block have no row and use no memory."""

    name: ClassVar[str] = "full"
    grows: ClassVar[bool] = True

    def rows(self, end: int, length: int) -> int:
        return end


def fitted(options: Options) -> Options:
    """Options of a canvas. For a block-causal model, reuse and extent are replaced by the policies of this module."""
    if options.attention == "full":
        return options
    policy = BlockCausal(options.decoding.block_length, options.reuse)
    return replace(options, reuse=policy, extent=CommittedExtent())


def final(canvas: "Canvas") -> int:
    """Length of the prefix whose keys and values can no longer change; 0 for other models"""
    policy = canvas.options.reuse
    return policy.final(canvas.progress) if isinstance(policy, BlockCausal) else 0


def reads(canvas: "Canvas") -> bool:
    """Whether the next step reads logits of the current block"""
    policy = canvas.options.reuse
    return not isinstance(policy, BlockCausal) or policy.reads(canvas.progress)


def written(canvas: "Canvas") -> int:
    """Length of the final prefix that is cached after the next step; 0 for other models"""
    policy = canvas.options.reuse
    return policy.written(canvas.progress) if isinstance(policy, BlockCausal) else 0


class BlockCausalAttention(Feature):
    name = "block_causal"

    @classmethod
    def applies(cls, canvas: "Canvas") -> bool:
        return isinstance(canvas.options.reuse, BlockCausal)

    def __init__(self, canvas: "Canvas"):
        super().__init__(canvas)
        self.keys: dict[bool, SelectedKeys] = {}  # key: whether the stream is the unconditional one

    def streams(self, state: "Denoising", made: list[Stream], room: Room) -> list[Stream]:
        """Splits each stream by blocks. Only the last part, the current block, is read."""
        parts = state.options.reuse.parts(state.canvas.progress, state.canvas.plan.live)
        found: list[Stream] = []
        reading = self._reading(state, made[0].reading)
        heads = state.head_rows(reading.positions)
        for stream in made:
            for rows, end in parts:
                part = replace(
                    stream,
                    plan=StepPlan.dense(rows),
                    token_ids=stream.token_ids[:end],
                    head_positions=NOTHING,
                    changed=NOTHING,
                    last=None,
                    reading=None,
                )
                if end == parts[-1][1]:
                    part.reading, part.head_positions = reading, heads
                    # Other parts compute final positions: prompts, and blocks that become final.
                    if len(heads) and (keys := self._keys(state, stream.guides, room)) is not None:
                        part.selected, part.chooses = keys, keys.step_begins()
                        part.response = int(rows[0]), end
                found.append(part)
        return found

    @staticmethod
    def _reading(state: "Denoising", reading: Reading | None) -> Reading:
        at = state.canvas.progress
        assert reading is not None
        own = reading.positions >= max(at.block[0], at.prompt_len)
        return Reading(state, reading.positions[own] if reads(state.canvas) else NOTHING)

    def _keys(self, state: "Denoising", guides: bool, room: Room) -> SelectedKeys | None:
        """Final positions that the current block attends to; None: all. The first step of a block attends to all of
        them, because after a preemption or with a long prompt it also writes some."""
        selection, at = state.options.selection, state.canvas.progress
        if not selection.sparse or not at.block_step or not selection.applies(at.written, at.length):
            return None
        keys = self.keys.get(guides)
        if keys is None or keys.prompt_len != at.written:
            own = state.blocks[int(guides)]
            keys = room.caches.selected_keys(selection, at.written, at.length, own, described=False)
            self.keys[guides] = keys
        return keys
