"""What every reuse policy shares: the plan of a step, made on the host, and the rows it leaves to the layers.

`plan` is a pure function of where a canvas stands, so the scheduler (to spend
its budget) and the runner (to pack rows) come to the same answer without
talking to each other. It says which rows are alive; which of those are
recomputed may be left to the layers, where `select_pre` (before attention) and
`select_post` (after it) see how far values and contexts have moved.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch


@dataclass(frozen=True)
class Progress:
    """Where a canvas stands; all that a plan may depend on. Positions count from the start of the canvas."""

    prompt_len: int
    length: int  # prompt and response
    block: tuple[int, int]  # [start, end) of the current block
    block_step: int  # forwards of this block so far
    step: int  # forwards of this request so far
    cold: bool  # nothing is cached: a new request, or one resumed after preemption
    shift: int  # logits at i predict i + shift: the row before the first wanted position lives, too

    @property
    def response(self) -> tuple[int, int]:
        """Rows from which the whole response can be read."""
        return max(self.prompt_len - self.shift, 0), self.length


@dataclass(frozen=True)
class StepPlan:
    live: tuple[int, int]  # rows carried from the embedding to the head
    forced: tuple[int, int]  # those recomputed in every layer whatever select_pre says
    budget: int | None  # how many of the others are recomputed; None: a threshold decides
    rows: int  # rows recomputed, as the scheduler counts them
    refresh: bool  # an expensive step of a policy that also has cheap ones

    @classmethod
    def dense(cls, live: tuple[int, int], refresh: bool = False) -> "StepPlan":
        return cls(live, live, 0, live[1] - live[0], refresh)

    def whole(self, length: int) -> bool:
        """Every row is recomputed in every layer, so attention needs nothing from earlier steps."""
        return self.live == self.forced == (0, length)


class LayerRows(Protocol):
    """What the select hooks may know of the live rows of one policy; T rows of several canvases."""

    forced: torch.Tensor  # [T] bool: recomputed anyway (by the plan, or because their token just changed)
    canvas: torch.Tensor  # [T] int64: which canvas a row belongs to
    budgets: torch.Tensor  # [canvases] int64: rows each canvas may recompute beside the forced ones


@dataclass(frozen=True)
class Reuse:
    name: ClassVar[str | None] = None
    #: field values published for a model and task, chosen as "name/preset"
    presets: ClassVar[dict[str, dict]] = {}
    #: "none", "sum" (attention + FFN output) or "context_ffn" (context before o_proj, FFN output)
    features: ClassVar[str] = "none"
    #: "exact_rows": recomputed rows attend, the others keep their cached output.
    #: "delta_v": every live row attends; where it is not recomputed only the moved values are added.
    attention: ClassVar[str] = "exact_rows"
    #: K and V are written to pages and read back by later steps
    caches: ClassVar[bool] = True
    #: whether select_pre looks at the rows' values, and select_post at their contexts
    selects: ClassVar[str | None] = None

    #: refresh steps of different requests are kept out of each other's forwards; results do not depend on it
    stagger: ClassVar[bool] = False

    def plan(self, at: Progress) -> StepPlan:
        raise NotImplementedError

    def feature_rows(self, prompt_len: int, length: int) -> int:
        """How many rows, counted from the end of the canvas, keep their features."""
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

    def select_pre(self, rows: LayerRows, similarity_T: torch.Tensor) -> torch.Tensor:
        """[T] bool: rows recomputed in this layer, by the cosine of their new and cached values."""
        raise NotImplementedError

    def select_post(self, rows: LayerRows, similarity_T: torch.Tensor) -> torch.Tensor:
        """[T] bool: rows recomputed from here on, by the cosine of their new and cached contexts."""
        raise NotImplementedError


def least_similar(rows: LayerRows, similarity_T: torch.Tensor) -> torch.Tensor:
    """[T] bool: in each canvas the `budgets` rows of lowest similarity, ties to the lowest row."""
    # One stable sort for all canvases: by similarity, then by canvas; the rank within a canvas follows.
    order_T = similarity_T.argsort(stable=True)
    order_T = order_T[rows.canvas[order_T].argsort(stable=True)]
    counts = torch.bincount(rows.canvas, minlength=len(rows.budgets))
    first = counts.cumsum(0) - counts
    rank_T = torch.empty_like(order_T)
    rank_T[order_T] = torch.arange(len(order_T), device=order_T.device) - first[rows.canvas[order_T]]
    return rank_T < rows.budgets[rows.canvas]
