"""Canvases packed into one forward without padding: who the live rows are and where their caches lie.

Rows (queries), positions of a canvas (keys) and requests are three index
spaces and stay apart: a row knows its canvas, its position and its slots.
Canvases that are treated alike, same policy and same kind of step, form a
group of consecutive rows.
"""

from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch

from vllm_dlm.cache.blocks import Slots
from vllm_dlm.cache.budget import BlockShape
from vllm_dlm.engine.selected_keys import View
from vllm_dlm.engine.selecting import Selecting, selecting
from vllm_dlm.plugins.reuse.base import Reuse, StepPlan
from vllm_dlm.plugins.reuse.flow import Columns, Rows

#: vLLM hands it to nobody; what has no slot of its own is written here
NULL_BLOCK = 0
NO_BLOCKS = np.zeros(0, dtype=np.int64)


@dataclass
class Stream:
    """One canvas in one step: a request, or its guidance twin."""

    reuse: Reuse
    plan: StepPlan
    token_ids: np.ndarray  # [N] the whole canvas
    head_positions: np.ndarray  # positions whose hidden state the head needs, ascending, all live
    changed: np.ndarray  # positions whose token changed since the last forward
    response: tuple[int, int]  # positions from which the response is read
    feature_rows: int = 0  # the last so many positions keep features
    kv_table: np.ndarray | None = None  # block ids, in order
    feature_table: np.ndarray = field(default_factory=lambda: NO_BLOCKS)
    view: View | None = None  # what a selection lets the response see; None: everything
    filtered: bool = False  # even where every row is recomputed
    chooses: bool = False  # the view changes in this step

    @property
    def whole(self) -> bool:
        return self.plan.whole(len(self.token_ids))

    @property
    def cached(self) -> bool:
        return self.kv_table is not None

    @property
    def kind(self) -> tuple:
        # Of one policy some canvases may have blocks and others none: `none` has them under a selection only.
        return self.reuse, self.cached, self.whole, self.filtered, self.view and self.view.selection

    @property
    def num_rows(self) -> int:
        return len(self.plan.live)


@dataclass
class Group:
    """Packed live rows of the canvases of one kind. T rows; all tensors on the device."""

    reuse: Reuse
    whole: bool
    filtered: bool
    selecting: Selecting | None  # what their responses see; None: everything
    span: slice  # of the forward's packed rows
    positions: torch.Tensor  # [T]
    canvas: torch.Tensor  # [T] index of the row's canvas within the group
    columns: Columns
    voters: torch.Tensor  # [T] bool: rows from which a token is to be read
    kv_lens: list[int]
    tables: list[torch.Tensor]  # block ids of each canvas
    slots: Slots  # of each row's K and V
    feature_width: int
    feature_slots: Slots  # of each row's features; those of rows that keep none are nobody's
    all: Rows
    forced: Rows
    response: Rows
    wanted: Rows
    head: Rows  # [R] those the head needs
    #: [S] the first places of each canvas when its rows are sorted by similarity, forced ones first
    leading: Rows

    def where(self, mask_T: torch.Tensor) -> Rows:
        index = mask_T.nonzero()[:, 0]
        return Rows(index, torch.bincount(self.canvas[index], minlength=len(self.kv_lens)).tolist())

    def least_similar(self, similarity_T: torch.Tensor) -> Rows:
        # One stable sort for all canvases: by similarity, then by canvas.
        order_T = similarity_T.masked_fill(self.columns.forced, -torch.inf).argsort(stable=True)
        order_T = order_T[self.canvas[order_T].argsort(stable=True)]
        return Rows(self.leading.of(order_T).sort().values, self.leading.counts)


@dataclass
class Packed:
    ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    groups: list[Group]


def split(streams: list[Stream], max_rows: int) -> list[list[Stream]]:
    """Forwards of at most `max_rows` rows, whole canvases each (one canvas may be alone with more)."""
    forwards: list[list[Stream]] = [[]]
    rows = 0
    for stream in streams:
        if forwards[-1] and rows + stream.num_rows > max_rows:
            forwards.append([])
            rows = 0
        forwards[-1].append(stream)
        rows += stream.num_rows
    return forwards


def pack(streams: list[Stream], device: torch.device, shape: BlockShape) -> Packed:
    """`streams` come sorted by kind."""
    ids = np.concatenate([s.token_ids[s.plan.live] for s in streams])
    positions = np.concatenate([s.plan.live for s in streams])
    groups, start = [], 0
    for _, members in groupby(streams, key=lambda s: s.kind):
        alike = list(members)
        end = start + sum(s.num_rows for s in alike)
        groups.append(Packing(alike, device, shape).group(slice(start, end)))
        start = end
    both = torch.from_numpy(np.stack([ids, positions])).to(device, non_blocking=True)
    return Packed(both[0], both[1], groups)


class Packing:
    """Of canvases of one kind."""

    def __init__(self, streams: list[Stream], device: torch.device, shape: BlockShape):
        self.streams, self.device, self.block_size = streams, device, shape.block_size
        self.reuse = streams[0].reuse
        self.feature_width = self.reuse.feature_width(shape.row)
        self.features_per_block = shape.features_per_block(self.reuse)

    def group(self, span: slice) -> Group:
        streams, cached = self.streams, self.streams[0].cached
        forced = [self._forced(stream) for stream in streams]
        heads = [among(s, s.head_positions) for s in streams]
        response = [s.plan.live >= s.response[0] for s in streams]
        # The last layer's features of prompt rows would feed nobody but those rows.
        wanted = [
            head | (read & (s.plan.live >= len(s.token_ids) - s.feature_rows))
            for s, head, read in zip(streams, heads, response, strict=True)
        ]
        columns = Columns(
            forced=self._upload(forced, np.bool_),
            changed=self._upload([among(s, s.changed) for s in streams], np.bool_),
            fresh=self._upload([read & s.chooses for s, read in zip(streams, response, strict=True)], np.bool_),
            response=self._upload(response, np.bool_),
        )
        sizes = [s.num_rows for s in streams]
        every = [np.ones(size, np.bool_) for size in sizes]
        masks = {"all": every, "forced": forced, "response": response, "wanted": wanted}
        sets = {name: self._rows(own) for name, own in masks.items()}
        prompt_rows = [int(len(read) - read.sum()) for read in response]
        chosen = None
        if views := [s.view for s in streams if s.view]:
            chosen = selecting(views, sizes, prompt_rows, streams[0].whole, self._upload_array)
            for name, own in masks.items():
                chosen.knows(sets[name], [int((mask & ~read).sum()) for mask, read in zip(own, response, strict=True)])
        nowhere = Slots(*[torch.zeros(0, dtype=torch.int64, device=self.device)] * 2)
        return Group(
            reuse=self.reuse,
            whole=streams[0].whole,
            filtered=streams[0].filtered,
            selecting=chosen,
            span=span,
            positions=self._upload([s.plan.live for s in streams]),
            canvas=self._upload([np.full(size, i) for i, size in enumerate(sizes)]),
            columns=columns,
            voters=self._upload(heads, np.bool_),
            kv_lens=[len(s.token_ids) for s in streams],
            tables=[torch.from_numpy(s.kv_table).to(self.device) for s in streams] if cached else [],
            slots=self._slots() if cached else nowhere,
            feature_width=self.feature_width,
            feature_slots=self._feature_slots() if any(s.feature_rows for s in streams) else nowhere,
            **sets,
            head=self._rows(heads),
            leading=self._leading(forced),
        )

    def _upload(self, parts: list[np.ndarray], dtype=np.int64) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(dtype)).to(self.device, non_blocking=True)

    def _upload_array(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def _rows(self, masks: list[np.ndarray]) -> Rows:
        counts = [int(mask.sum()) for mask in masks]
        together = np.concatenate(masks)
        return Rows(None if together.all() else self._upload([np.flatnonzero(together)]), counts)

    def _forced(self, stream: Stream) -> np.ndarray:
        """[T] bool: by the plan, and those of new tokens unless the policy has it otherwise"""
        plan = stream.plan
        if len(plan.forced) == len(plan.live):
            return np.ones(len(plan.live), np.bool_)
        forced = among(stream, plan.forced)
        return forced | among(stream, stream.changed) if self.reuse.force_changed else forced

    def _leading(self, forced: list[np.ndarray]) -> Rows:
        """Rows of new tokens are forced and count against the plan's budget."""
        counts, places, start = [], [], 0
        for stream, mask in zip(self.streams, forced, strict=True):
            plan = stream.plan
            count = min(max(int(mask.sum()), len(plan.forced) + (plan.budget or 0)), len(plan.live))
            counts.append(count)
            places.append(np.arange(start, start + count))
            start += len(plan.live)
        return Rows(self._upload(places), counts)

    def _slots(self) -> Slots:
        tables = [(s, s.kv_table) for s in self.streams if s.kv_table is not None]
        blocks = [table[s.plan.live // self.block_size] for s, table in tables]
        return Slots(self._upload(blocks), self._upload([s.plan.live % self.block_size for s in self.streams]))

    def _feature_slots(self) -> Slots:
        blocks, offsets = [], []
        for stream in self.streams:
            row = stream.plan.live - (len(stream.token_ids) - stream.feature_rows)
            table = stream.feature_table if stream.feature_rows else np.array([NULL_BLOCK])
            keeps = (row >= 0) & (stream.feature_rows > 0)
            row = np.where(keeps, row, 0)
            blocks.append(np.where(keeps, table[row // self.features_per_block], NULL_BLOCK))
            offsets.append(np.where(keeps, row % self.features_per_block, 0))
        return Slots(self._upload(blocks), self._upload(offsets))


def among(stream: Stream, positions: np.ndarray) -> np.ndarray:
    """[T] bool: which live rows are of these positions"""
    mask = np.zeros(len(stream.token_ids), np.bool_)
    mask[positions] = True
    return mask[stream.plan.live]
