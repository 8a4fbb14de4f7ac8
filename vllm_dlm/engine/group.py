"""What layers know of the canvases of one forward: groups of packed rows, all tensors on the device.

packing.py makes them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_dlm.cache.blocks import Slots
from vllm_dlm.engine.selecting import Selecting
from vllm_dlm.kernels.lowest_rows import lowest_rows
from vllm_dlm.plugins.reuse.base import Reuse
from vllm_dlm.plugins.reuse.flow import Columns, Picked, Rows


class Unknown(RuntimeError):
    """A flow asks for rows of which a captured step knows no number."""


class UnknownRows(Rows):
    """Of which every step has another number."""

    def __getattribute__(self, name):
        if name == "index":
            raise Unknown("rows that are not all of the live ones")
        return super().__getattribute__(name)


@dataclass
class Group:
    """Packed live rows of the canvases of one kind: T rows, C canvases; all tensors on the device."""

    reuse: Reuse
    whole: bool
    filtered: bool
    cached: bool  # the canvases have blocks for keys and values
    selecting: Selecting | None  # what their responses see; None: everything
    span: slice  # of the forward's packed rows
    row_places: torch.Tensor  # [T] which row of its canvas each is
    canvas: torch.Tensor  # [T] index of the row's canvas within the group
    columns: Columns
    voters: torch.Tensor  # [T] bool: rows from which a token is to be read
    kv_lens: list[int]
    kv_ends: torch.Tensor  # [2, C + 1] int32: where each canvas's keys begin among all of them; their number (and 0)
    table: torch.Tensor  # [C, blocks] int32 ids of each canvas, filled up with NULL_BLOCK
    tables: list[torch.Tensor]  # the same, each canvas its own
    feature_width: int
    feature_slots: Slots  # of each row's features; those of rows that keep none are nobody's
    all_keep: bool  # there are no such rows
    all: Rows
    forced: Rows
    response: Rows
    wanted: Rows
    head: Rows  # [R] those the head needs
    #: how many rows of each canvas a plan with a budget recomputes, and where these begin, [C + 1] int32
    leading: tuple[list[int], torch.Tensor]
    masks: bool  # rows that only the device knows ride along with the others
    hidden_row: int | None  # of shadows, see Stream
    max_q: int  # no canvas has more rows
    max_kv: int  # nor more positions
    places: torch.Tensor | None = None  # [C, longest canvas] int32: the live row of each position, once somebody asks

    def begin(self) -> None:
        """Forgets what a forward has found."""
        self.columns.carried.clear()
        self.places = None

    def where(self, mask_T: torch.Tensor, rows: Rows) -> Picked:
        mask = rows.of(mask_T)
        if self.masks:
            return Picked(Rows(rows.index, rows.counts, rows.starts, mask), None)
        place = mask.nonzero()[:, 0]
        index = place if rows.index is None else rows.index[place]
        counts = torch.bincount(self.canvas[index], minlength=len(self.kv_lens)).tolist()
        return Picked(Rows(index, counts), place)

    def least_similar(self, similarity_T: torch.Tensor) -> Rows:
        counts, starts = self.leading
        index = lowest_rows(similarity_T, self.columns.forced, self.all.starts, starts, sum(counts))
        return Rows(index, counts, starts)


@dataclass
class Packed:
    ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T] that the rows stand for
    slots: Slots  # [T] of each row's key and value; canvases without blocks have none
    nowhere: torch.Tensor  # [] a block that is none
    groups: list[Group]
    layers: Callable[..., Any] | None = None  # what drives them in the place of LayerStep, for those who look on
