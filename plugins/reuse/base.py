"""Base class of reuse policies: the plan of a step, made on the host, and the flow of a layer.

`plan` is a pure function of a canvas's progress. The scheduler (to spend its
budget) and the runner (to pack rows) therefore compute the same plan without
communicating. It names the live rows. `layer` is the policy itself: one
transformer layer written as a generator of requests to the engine, see flow.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import numpy as np

from vllm_dlm.plugins.reuse.flow import Flow, Layer, dense


@dataclass(frozen=True, eq=False)
class Progress:
    """Progress of a canvas. A plan may depend on nothing else. Positions count from the start of the canvas."""

    prompt_len: int
    length: int  # number of rows, one per position: prompt and response, or fewer if the extent leaves positions out
    block: tuple[int, int]  # [start, end) of the current canvas block
    block_step: int  # forwards of this block so far
    step: int  # forwards of this request so far
    cold: bool  # some rows have no cached state: new request, request resumed after preemption, or new rows
    shift: int  # logits at i predict i + shift, so the row before the first wanted position must be live, too
    mask_id: int
    tokens: np.ndarray  # [N] int64, mask_id where nothing is filled in yet; read-only
    # [N] float32: probability of the best token in the last step that read the position; NaN if none has
    confidence: np.ndarray
    changed: np.ndarray  # positions that the last step filled or masked again, ascending
    written: int = 0  # length of the prefix whose keys and values are cached for good, see canvas/block_causal.py
    grown: bool = False  # only the rows that this block added have no cached state
    block_before: int = 0  # start of the previous canvas block; in the first block, its own start
    first: int = 0  # length of the suffix text, whose rows come before the prompt's, see Canvas.positions
    # [N] int64: number of forwards of this request when the position got its token; 0: it was given
    filled_at: np.ndarray = field(default_factory=lambda: span(0, 0))

    @property
    def response(self) -> tuple[int, int]:
        """Rows from which the whole response can be read."""
        return max(self.prompt_len - self.shift, 0), self.length

    @cached_property
    def masked(self) -> np.ndarray:
        """Positions to be filled, ascending."""
        return np.flatnonzero(self.tokens == self.mask_id)

    def rows_reading(self, positions: np.ndarray) -> np.ndarray:
        """The row whose logits predict each position. Dream's logits at i predict i + 1. Position 0 falls back to its
        own row, which also predicts position 1."""
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
    """Positions [start, end) with start >= 0, as a shared read-only array."""
    return _POSITIONS.up_to(end)[start:end]


@dataclass(frozen=True, eq=False)
class StepPlan:
    live: np.ndarray  # [T] rows carried from the embedding to the head, as ascending positions
    forced: np.ndarray  # live rows that are recomputed in every layer, regardless of the flow's selection; ascending
    budget: int | None  # number of other rows that are recomputed; None: the flow decides
    rows: int  # rows recomputed, as the scheduler counts them
    refresh: bool  # an expensive step of a policy that also has inexpensive ones
    force_changed: bool = True  # rows whose token just changed are recomputed in every layer, too

    @classmethod
    def dense(cls, live: np.ndarray, refresh: bool = False) -> "StepPlan":
        """All live rows are recomputed in every layer."""
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
    """By default, every row is recomputed in every layer of every step: the exact model.

    A class may define a property `layer_key`: all that its `layer` depends on. Policies with equal keys share CUDA
    graphs. Subclasses do not inherit it; without one, all fields are the key (step/buckets.py)."""

    name: ClassVar[str | None] = None
    #: field values published for a model and task, chosen as "name/preset"
    presets: ClassVar[dict[str, dict]] = {}
    #: field values at which every row is recomputed in every step, so that the model is exact; None: no such values
    exact: ClassVar[dict | None] = None
    #: K and V are written to the cache and read back by later steps
    caches: ClassVar[bool] = True
    #: contexts are kept and updated, which requires that they attend to the same keys; a selection's choice is
    #: therefore kept until the prompt is refreshed
    keeps_contexts: ClassVar[bool] = False

    @property
    def block_alone(self) -> bool:
        """Between refreshes exactly the rows of the canvas block are live, and all of them are recomputed. Nothing else
        of the canvas changes in such a step."""
        return False

    @property
    def stagger(self) -> bool:
        """The scheduler spreads refreshes of different requests over steps. Results do not depend on it."""
        return False

    # -- on the host -----------------------------------------------------------------------

    def plan(self, at: Progress) -> StepPlan:
        return StepPlan.dense(span(0, at.length))

    def feature_rows(self, prompt_len: int, length: int) -> int:
        """Number of rows, counted from the end of the canvas, that keep features in each layer."""
        return 0

    def feature_width(self, row: RowShape) -> int:
        """Number of features that each of those rows keeps per layer."""
        return 0

    def due(self, positions: np.ndarray, at: Progress) -> np.ndarray | None:
        """The only candidates that this step reads, because no later step of the block can read them. They are all
        filled, regardless of the decoding's choice. None: the step reads all candidates and the decoding chooses.
        `positions`: all candidates"""
        return None

    # -- in a layer ------------------------------------------------------------------------

    def layer(self, at: Layer) -> Flow:
        """One transformer layer over the live rows of a group: canvases with the same policy and kind of step."""
        return dense(at)


def joined(*parts: Iterable[int]) -> np.ndarray:
    """Union of sets of positions, ascending."""
    return np.unique(np.concatenate([np.asarray(part, dtype=np.int64) for part in parts]))
