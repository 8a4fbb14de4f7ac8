"""What every reuse policy shares: the plan of a step, made on the host, and the flow of a layer.

`plan` is a pure function of where a canvas stands, so the scheduler (to spend
its budget) and the runner (to pack rows) come to the same answer without
talking to each other. It says which rows are alive. `layer` is the policy
itself: one transformer layer written down as a generator of asks, see flow.py.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from vllm_dlm.plugins.reuse.flow import Flow, Layer, dense


@dataclass(frozen=True, eq=False)
class Progress:
    """Where a canvas stands; all that a plan may depend on. Positions count from the start of the canvas."""

    prompt_len: int
    length: int  # rows of the canvas, which a position has each: prompt and response, or as far as its extent goes
    block: tuple[int, int]  # [start, end) of the current canvas block
    block_step: int  # forwards of this block so far
    step: int  # forwards of this request so far
    cold: bool  # nothing is cached, or not of all rows: a new request, one resumed after preemption, or new rows
    shift: int  # logits at i predict i + shift: the row before the first wanted position lives, too
    mask_id: int
    tokens: np.ndarray  # [N] int64, masks where nothing is filled in yet; not to be written to
    # [N] float32: what the last step that read a position gave its best token; NaN where none has
    confidence: np.ndarray
    changed: np.ndarray  # positions that the last step filled, or made masks again, ascending
    written: int = 0  # so many positions from the start have keys and values that stay, see Reuse.written
    first: int = 0  # before it lies what comes behind the canvas, see Canvas.positions

    @property
    def response(self) -> tuple[int, int]:
        """Rows from which the whole response can be read."""
        return max(self.prompt_len - self.shift, 0), self.length

    @cached_property
    def masked(self) -> np.ndarray:
        """Positions to be filled, ascending."""
        return np.flatnonzero(self.tokens == self.mask_id)

    def rows_reading(self, positions: np.ndarray) -> np.ndarray:
        """The row whose logits predict each position. Dream's at i predict i + 1; position 0 falls back on its own
        row, which position 1 is read at, too."""
        if not self.shift or not self.first:
            return np.maximum(positions - self.shift, 0)
        rows = np.where(positions == self.first, positions, positions - self.shift)
        return np.where(rows < 0, self.length - 1, rows)


class _Positions:
    """0, 1, 2, … as far as the longest canvas so far: spans are views of one array."""

    def __init__(self) -> None:
        self.all = np.arange(0)

    def up_to(self, end: int) -> np.ndarray:
        if end > len(self.all):
            self.all = np.arange(max(end, 2 * len(self.all)))
            self.all.flags.writeable = False
        return self.all


_POSITIONS = _Positions()


def span(start: int, end: int) -> np.ndarray:
    """Positions [start, end), start >= 0; shared memory, not to be written to"""
    return _POSITIONS.up_to(end)[start:end]


@dataclass(frozen=True, eq=False)
class StepPlan:
    live: np.ndarray  # [T] rows carried from the embedding to the head: ascending positions
    forced: np.ndarray  # of those the ones recomputed in every layer, whatever the flow finds; ascending
    budget: int | None  # how many of the others are recomputed; None: what the flow finds decides
    rows: int  # rows recomputed, as the scheduler counts them
    refresh: bool  # an expensive step of a policy that also has cheap ones

    @classmethod
    def dense(cls, live: np.ndarray, refresh: bool = False) -> "StepPlan":
        return cls(live, live, 0, len(live), refresh)

    def whole(self, length: int) -> bool:
        """Every row is recomputed in every layer, so attention needs nothing from earlier steps."""
        return len(self.live) == len(self.forced) == length


@dataclass(frozen=True)
class RowShape:
    """Widths of one row in one layer, on one rank."""

    context: int  # H * D, attention before its output projection
    hidden: int  # E


@dataclass(frozen=True)
class Reuse:
    """What says nothing else recomputes every row of every layer in every step: the exact model."""

    name: ClassVar[str | None] = None
    #: field values published for a model and task, chosen as "name/preset"
    presets: ClassVar[dict[str, dict]] = {}
    #: field values at which every row is recomputed in every step, so that the model is exact; None: there are none
    exact: ClassVar[dict | None] = None
    #: K and V are written to the cache and read back by later steps
    caches: ClassVar[bool] = True
    #: contexts are kept and added to, which holds only as long as they are of the same keys: what a selection has
    #: chosen stays until the prompt is refreshed
    keeps_contexts: ClassVar[bool] = False

    @property
    def block_alone(self) -> bool:
        """Between refreshes rows of the canvas block live and no others, all of them recomputed: beside its keys and
        values nothing of the canvas changes."""
        return False

    @property
    def layer_key(self) -> Hashable:
        """All that `layer` depends on. Policies with equal keys share CUDA graphs. Subclasses do not inherit it."""
        return self

    @property
    def stagger(self) -> bool:
        """Refreshes of different requests are spread over the engine's steps; results do not depend on it."""
        return False

    # -- on the host -----------------------------------------------------------------------

    def plan(self, at: Progress) -> StepPlan:
        return StepPlan.dense(span(0, at.length))

    def final(self, at: Progress) -> int:
        """Keys and values of so many positions from the start no later token changes, whether they are there or not."""
        return 0

    def written(self, at: Progress) -> int:
        """So many positions from the start have keys and values, after this step, that no later token changes."""
        return 0

    def reads(self, at: Progress) -> bool:
        """This step reads something of the current block: others do not count as steps of it."""
        return True

    def sights(self, live: np.ndarray) -> list[tuple[np.ndarray, int]] | None:
        """Rows that see no farther than to an end of their own, in parts; None: all see the whole canvas."""
        return None

    def feature_rows(self, prompt_len: int, length: int) -> int:
        """How many rows, counted from the end of the canvas, keep features of their own in each layer."""
        return 0

    def feature_width(self, row: RowShape) -> int:
        """Numbers that each of those rows keeps."""
        return 0

    @property
    def force_changed(self) -> bool:
        """Rows whose token just changed are recomputed in every layer."""
        return True

    def candidates(self, positions: np.ndarray, at: Progress) -> np.ndarray:
        """Masked positions that may be filled in this step, of those whose logits the live rows give."""
        return positions

    def due(self, positions: np.ndarray, at: Progress) -> np.ndarray:
        """Those of this step's candidates that no later step of the block can read: they are filled now, whatever
        the decoding says."""
        return positions[:0]

    # -- in a layer ------------------------------------------------------------------------

    def layer(self, at: Layer) -> Flow:
        """One transformer layer over the live rows of canvases that stand alike."""
        return dense(at)


def joined(*parts: Iterable[int]) -> np.ndarray:
    """Sets of positions as one, ascending."""
    return np.unique(np.concatenate([np.asarray(part, dtype=np.int64) for part in parts]))
