"""The batch of one forward on the device: the live rows of its streams, packed without padding. Built by packing.py.

Rows (queries), positions of a canvas (keys) and streams are three index spaces: a row belongs to a stream, represents a
position and has cache slots. Streams of one kind (same policy and same kind of step) form a group of consecutive rows.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from vllm_dlm.cache.blocks import Slots
from vllm_dlm.kernels.lowest_rows import lowest_rows
from vllm_dlm.plugins.reuse.base import Reuse
from vllm_dlm.plugins.reuse.flow import Columns, PickedRows, Rows
from vllm_dlm.step.selection import GroupSelection

if TYPE_CHECKING:
    from vllm_dlm.step.layer import LayerObserver


class Limits(NamedTuple):
    """Upper bounds for all steps that replay one captured step"""

    max_q: int  # rows per stream
    max_kv: int  # positions per stream
    blocks: int  # width of the tables


class UncapturedRowsError(RuntimeError):
    """A flow needs a set of rows that differs in size between steps that replay the same captured step."""


class UncapturedRows(Rows):
    """Rows of a captured step that are not all live rows. Their number is known, their indices are not."""

    def __init__(self, counts: list[int], starts: torch.Tensor):
        for name, value in (("counts", counts), ("starts", starts), ("mask", None), ("before", None), ("found", {})):
            object.__setattr__(self, name, value)

    @property
    def index(self) -> torch.Tensor | None:
        raise UncapturedRowsError("rows that are not all of the live ones")


class RowNumbers(NamedTuple):
    """[T] int64 each: columns of one table, sent in one transfer"""

    ids: Any  # token
    place: Any  # row of its stream
    position: Any  # position that the row represents
    stream: Any  # index of its stream within the group
    block: Any  # KV block of the row's key and value, -1: none; and the offset in it
    offset: Any
    feature_block: Any  # the same for the row's features
    feature_offset: Any


class RowFlags(NamedTuple):
    """[T] bool each, sent in one transfer; see Columns"""

    forced: Any
    changed: Any
    fresh: Any
    head: Any  # the head reads the row


class Starts(NamedTuple):
    """[C + 1] int32 each, sent in one transfer: index of the first row of each stream among the rows of a set"""

    all: Any
    forced: Any
    response: Any
    wanted: Any
    head: Any
    leading: Any
    keys: Any  # index of the first key of each stream among all keys
    key_counts: Any  # number of keys of each stream, then 0


@dataclass
class Group:
    """Live rows of the streams of one kind: T rows, C streams; all tensors on the device."""

    reuse: Reuse
    whole: bool
    filtered: bool
    cached: bool  # the streams have blocks for keys and values
    selection: GroupSelection | None  # keys that the responses attend to; None: all of them
    span: slice  # rows of the batch
    row_places: torch.Tensor  # [T] index of the row within its stream
    stream: torch.Tensor  # [T] index of the row's stream within the group
    columns: Columns
    voters: torch.Tensor  # [T] bool: rows from which a token is read
    kv_lens: list[int]
    key_starts: torch.Tensor  # [C + 1] int32: index of each stream's first key among all keys
    key_counts: torch.Tensor  # [C] int32
    table: torch.Tensor  # [C, blocks] int32 ids of each stream's blocks, padded with NULL_BLOCK
    tables: list[torch.Tensor]  # the same, one per stream
    feature_width: int
    feature_slots: Slots  # slots of each row's features; block -1 for rows that keep none
    all_keep: bool  # all rows keep features
    all: Rows
    forced: Rows
    response: Rows
    wanted: Rows
    head: Rows  # rows that the head needs
    leading_counts: list[int]  # number of rows per stream that a plan with a budget recomputes
    leading_starts: torch.Tensor  # [C + 1] int32
    masks: bool  # rows selected on the device are computed together with unselected rows, and masked
    hidden_row: int | None  # shadow streams only, see Stream
    drafted: list[torch.Tensor] | None  # per stream [S], see Stream
    max_q: int  # upper bound on rows per stream
    max_kv: int  # upper bound on keys per stream
    places: torch.Tensor | None = None  # [C, longest stream] int32: live row of each position, set on first use
    packed: dict[Any, Any] = field(default_factory=dict)  # see packed.py

    def begin(self) -> None:
        """Discards state of an earlier forward."""
        self.columns.carried.clear()
        self.packed.clear()
        self.places = None

    def where(self, mask_T: torch.Tensor, rows: Rows) -> PickedRows:
        mask = rows.gather(mask_T)
        if self.masks:
            return PickedRows(Rows(rows.index, rows.counts, rows.starts, mask), None)
        place = mask.nonzero()[:, 0]
        index = place if rows.index is None else rows.index[place]
        counts = torch.bincount(self.stream[index], minlength=len(self.kv_lens)).tolist()
        return PickedRows(Rows(index, counts), place)

    def least_similar(self, similarity_T: torch.Tensor) -> Rows:
        counts, starts = self.leading_counts, self.leading_starts
        index = lowest_rows(similarity_T, self.columns.forced, self.all.starts, starts, sum(counts))
        return Rows(index, counts, starts)


@dataclass
class Batch:
    ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T] positions that the rows represent
    slots: Slots  # [T] slots of each row's key and value; block -1 without blocks
    nowhere: torch.Tensor  # [] block number -1: no block
    groups: list[Group]
    observer: "LayerObserver | None" = None
