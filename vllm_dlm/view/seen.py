"""Records of steps of observed requests, in a worker"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_dlm.canvas.stream import Stream
from vllm_dlm.plugins.reuse.flow import Ask, Attend, AttendMoved, FeedForward, Rows
from vllm_dlm.step.batch import Group
from vllm_dlm.step.counts import Counts


@dataclass
class StepRecord:
    """One step of one request. N rows of its canvas."""

    ms: float = 0.0
    tokens: np.ndarray = field(
        default_factory=lambda: np.zeros(0, np.int64)
    )  # [C] tokens proposed at the positions that the commit read
    best: np.ndarray | None = None  # [2, BEST, C] the most probable tokens there, and their probabilities
    live: int = 0  # live rows, summed over layers
    recomputed: int = 0  # rows that pass the feed-forward, summed over layers
    keys_read: int = 0
    keys_there: int = 0
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0))  # [N] share of layers that recompute a row
    pages: np.ndarray | None = None  # [units] share of layers and key heads that read a unit
    unit: int = 1  # positions per unit
    fault: str | None = None  # why the view of this request failed


#: arguments: the counts, then for each canvas of a group the number of queries, of keys read, and of all keys
KeyCounter = Callable[["CanvasCounts", list[int], list[int], list[int]], None]


class CanvasCounts(Counts):
    """Counts of a group's attention, in total and for each canvas."""

    def __init__(self, canvases: int, count_keys: KeyCounter):
        super().__init__()
        self.count_keys = count_keys
        self.read, self.there = np.zeros(canvases, np.int64), np.zeros(canvases, np.int64)

    def attended(self, q_lens: list[int], kv_lens: list[int], read: bool, dense: list[int] | None = None) -> None:
        super().attended(q_lens, kv_lens, read, dense)
        if read:
            self.count_keys(self, q_lens, kv_lens, dense or kv_lens)

    def add_to(self, counts: Counts) -> None:
        for name in ("pairs", "keys_read", "keys_dense", "keys_scored", "summaries"):
            setattr(counts, name, getattr(counts, name) + getattr(self, name))


class GroupRecord:
    """Record of a group in all layers: T rows, C canvases"""

    def __init__(self, group: Group, streams: Sequence[Stream]):
        canvases = len(group.kv_lens)
        self.group, self.streams = group, streams
        self.queried: Rows | None = None  # rows of the last attention
        self.everywhere = 0  # number of layers that recomputed every row
        self.recomputed: torch.Tensor | None = None  # [T] number of other layers that recomputed a row, on the device
        self.through = np.zeros(canvases, np.int64)  # rows that passed the feed-forward
        self.read, self.there = np.zeros(canvases, np.int64), np.zeros(canvases, np.int64)
        self.shown: torch.Tensor | None = (
            None  # [C, 1 + units] number of reads of each unit, on the device; column 0 is padding
        )
        self.unseen = 0  # minus the number of layers with a selection
        self.noted = -1  # the last layer with a counted choice
        self.copies: list[torch.Tensor | None] = [None, None]

    def asked(self, ask: Ask) -> None:
        if isinstance(ask, (Attend, AttendMoved)):
            self.queried = ask.rows
        elif isinstance(ask, FeedForward):
            self._count_fed(self._fed(ask))

    def _fed(self, ask: FeedForward) -> Rows:
        """Rows that pass the feed-forward: picked rows, otherwise those of the last attention, or all rows"""
        if ask.picked is not None:
            return ask.picked.rows
        return self.group.all if self.queried is None or len(self.queried) != len(ask.x) else self.queried

    def _count_fed(self, rows: Rows) -> None:
        self.through += np.array(rows.counts)
        if rows.index is None and rows.mask is None:
            self.everywhere += 1
            return
        columns = self.group.columns.forced
        if self.recomputed is None:
            self.recomputed = torch.zeros(len(columns), dtype=torch.int32, device=columns.device)
        if rows.index is None:
            self.recomputed += rows.mask
        else:
            ones = torch.ones_like(rows.index) if rows.mask is None else rows.mask
            self.recomputed.index_add_(0, rows.index, ones.to(torch.int32))

    def attended(self, layer: int, counts: CanvasCounts) -> None:
        self.read, self.there = self.read + counts.read, self.there + counts.there
        selection = self.group.selection
        if selection is None or self.noted == layer:
            return
        if (visible := selection.visible_in(layer)) is None:
            return
        self.noted = layer
        units = selection.units(visible).long() + 1  # [C, Hkv, K]
        if self.shown is None:
            most = max(-(-view.length // view.selection.unit) for view in selection.keys)
            self.shown = torch.zeros(len(units), 1 + most, dtype=torch.int32, device=units.device)
            self.heads = units.shape[1]
        flat = units.flatten(1)
        self.shown.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.int32))
        self.unseen -= 1

    def bring(self) -> None:
        """Starts the copies to the host. They are complete once the output of the head is."""
        self.copies = [on_the_way(own) for own in (self.recomputed, self.shown)]

    def tell(self, steps: dict[str, StepRecord], layers: int) -> None:
        recomputed, shown = self.copies
        rows = np.zeros(len(self.group.columns.forced)) if recomputed is None else recomputed.numpy()
        start = 0
        for canvas, stream in enumerate(self.streams):
            span, start = slice(start, start + stream.num_rows), start + stream.num_rows
            if (seen := steps.get(stream.request)) is None:
                continue
            pages = None
            if shown is not None:
                view = self.group.selection.keys[canvas]  # type: ignore[union-attr]
                everything = (layers + self.unseen) * self.heads
                own = shown.numpy()[canvas, 1 : 1 - (-view.length // view.selection.unit)]
                pages = (own + everything) / (layers * self.heads), view.selection.unit
            counted = self.through[canvas], self.read[canvas], self.there[canvas]
            add(seen, stream, layers, counted, (rows[span] + self.everywhere) / layers, pages)


def add(seen: StepRecord, stream: Stream, layers: int, counted: Sequence, shares: np.ndarray, pages=None) -> None:
    """Adds a stream to a record. `shares`: share of layers that recompute each live row"""
    through, read, there = map(int, counted)
    seen.live += stream.num_rows * layers
    seen.recomputed += through
    seen.keys_read += read
    seen.keys_there += there
    if stream.guides or stream.hidden_row is not None:
        return
    live = stream.plan.live
    seen.rows[live] = np.maximum(seen.rows[live], shares)
    if pages is not None:
        seen.pages, seen.unit = pages


def on_the_way(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None or tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
