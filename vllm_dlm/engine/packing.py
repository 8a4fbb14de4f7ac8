"""Canvases packed into one forward without padding: who the live rows are and where their caches lie.

Rows (queries), positions of a canvas (keys) and requests are three index
spaces and stay apart: a row knows its canvas, its position and its slots.
Canvases that are treated alike, same policy and same kind of step, form a
group of consecutive rows.
"""

from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from vllm_dlm.cache.blocks import Slots
from vllm_dlm.engine.selected_keys import View
from vllm_dlm.plugins.reuse.base import Reuse, StepPlan


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
    feature_table: np.ndarray | None = None
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
        # Of one policy some canvases may have pages and others none: `none` has them under a selection only.
        return self.reuse, self.cached, self.whole, self.filtered, self.view and self.view.selection

    @property
    def num_rows(self) -> int:
        return self.plan.live[1] - self.plan.live[0]


@dataclass
class Group:
    """Packed live rows of the canvases of one kind. T rows; all tensors on the device."""

    reuse: Reuse
    whole: bool
    filtered: bool
    views: list[View]  # of the canvases; none, if they see everything
    rows: slice  # of the forward's packed rows
    positions: torch.Tensor  # [T]
    canvas: torch.Tensor  # [T] index of the row's canvas within the group
    forced: torch.Tensor  # [T] bool
    changed: torch.Tensor  # [T] bool
    voters: torch.Tensor  # [T] bool: rows from which a token is to be read
    fresh: torch.Tensor  # [T] bool: rows whose visible keys change in this step
    prompt_rows: list[int]  # live rows of each canvas before its response
    response_starts: list[int]
    budgets: torch.Tensor  # [canvases]
    live_lens: list[int]
    kv_lens: list[int]
    tables: list[torch.Tensor]  # block ids of each canvas
    slots: Slots  # of each row's K and V
    featured: torch.Tensor  # [F] rows that keep features
    feature_slots: Slots  # [F]
    out: torch.Tensor  # [O] rows anybody reads after the last layer of a dense step
    out_lens: list[int]
    read: torch.Tensor  # [P] rows of the response, and the row before it: all the head can ask for
    head: torch.Tensor  # [R] rows the head needs: into what the last layer gives
    salient: torch.Tensor | None = None  # [T] bool, carried from layer to layer

    def features_of(self, rows: torch.Tensor) -> tuple[torch.Tensor, Slots]:
        """Of ascending rows those that keep features: their places among `rows`, and their slots."""
        if len(rows) == len(self.positions):
            return self.featured, self.feature_slots
        kept = torch.isin(self.featured, rows)
        return torch.searchsorted(rows, self.featured[kept]), self.feature_slots[kept]

    def split_counts(self, rows: torch.Tensor) -> list[int]:
        """How many of the given rows each canvas has."""
        return torch.bincount(self.canvas[rows], minlength=len(self.live_lens)).tolist()


@dataclass
class Packed:
    ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    groups: list[Group]


def split(streams: list[Stream], max_rows: int) -> list[list[Stream]]:
    """Forwards of at most `max_rows` rows, whole canvases each (one canvas may be alone with more)."""
    forwards, rows = [[]], 0
    for stream in streams:
        if forwards[-1] and rows + stream.num_rows > max_rows:
            forwards.append([])
            rows = 0
        forwards[-1].append(stream)
        rows += stream.num_rows
    return forwards


def pack(streams: list[Stream], device, block_size: int, features_per_block) -> Packed:
    """`streams` come sorted by kind; `features_per_block(reuse)` says how many feature rows a block holds."""
    ids = np.concatenate([s.token_ids[slice(*s.plan.live)] for s in streams])
    positions = np.concatenate([np.arange(*s.plan.live) for s in streams])
    groups, start = [], 0
    for (reuse, *_), members in groupby(streams, key=lambda s: s.kind):
        members = list(members)
        count = sum(s.num_rows for s in members)
        groups.append(
            _group(reuse, members, slice(start, start + count), device, block_size, features_per_block(reuse))
        )
        start += count
    both = torch.from_numpy(np.stack([ids, positions])).to(device, non_blocking=True)
    return Packed(both[0], both[1], groups)


def _group(reuse, streams, rows, device, block_size, features_per_block) -> Group:
    whole, cached = streams[0].whole, streams[0].cached
    columns = {name: [] for name in ("position", "canvas", "forced", "changed", "voter", "fresh", "block", "offset")}
    featured, feature_block, feature_offset, out, read, head = [], [], [], [], [], []
    first = 0
    for index, stream in enumerate(streams):
        live = np.arange(*stream.plan.live)
        first_feature = len(stream.token_ids) - stream.feature_rows
        keeps = live >= first_feature
        columns["position"].append(live)
        columns["canvas"].append(np.full(len(live), index))
        changed = np.isin(live, stream.changed)
        columns["changed"].append(changed)
        forced = (live >= stream.plan.forced[0]) & (live < stream.plan.forced[1])
        columns["forced"].append(forced | changed if reuse.force_changed else forced)
        if cached:
            columns["block"].append(stream.kv_table[live // block_size])
            columns["offset"].append(live % block_size)
        if stream.feature_rows:
            slot = live[keeps] - first_feature
            featured.append(first + np.flatnonzero(keeps))
            feature_block.append(stream.feature_table[slot // features_per_block])
            feature_offset.append(slot % features_per_block)
        is_head = np.isin(live, stream.head_positions)
        head.append(first + np.flatnonzero(is_head))
        is_read = live >= stream.response[0]
        columns["voter"].append(is_head)
        columns["fresh"].append(is_read & stream.chooses)
        # The last layer's features of prompt rows would feed nobody but those rows.
        out.append(first + np.flatnonzero(is_head | (keeps & is_read)))
        read.append(first + np.flatnonzero(is_read))
        first += len(live)

    def upload(parts: list[np.ndarray], dtype=np.int64) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts or [np.zeros(0)]).astype(dtype)).to(device, non_blocking=True)

    head_rows = np.concatenate(head)
    last_rows = np.concatenate(out if whole else read if reuse.attention == "delta_v" else [np.arange(first)])
    return Group(
        reuse=reuse,
        whole=whole,
        filtered=streams[0].filtered,
        views=[stream.view for stream in streams if stream.view],
        rows=rows,
        positions=upload(columns["position"]),
        canvas=upload(columns["canvas"]),
        forced=upload(columns["forced"], np.bool_),
        changed=upload(columns["changed"], np.bool_),
        voters=upload(columns["voter"], np.bool_),
        fresh=upload(columns["fresh"], np.bool_),
        prompt_rows=[max(0, s.response[0] - s.plan.live[0]) for s in streams],
        response_starts=[s.response[0] for s in streams],
        budgets=upload([np.array([_budget(stream) for stream in streams])]),
        live_lens=[stream.num_rows for stream in streams],
        kv_lens=[len(stream.token_ids) for stream in streams],
        tables=[torch.from_numpy(s.kv_table).to(device) for s in streams] if cached else [],
        slots=Slots(upload(columns["block"]), upload(columns["offset"])),
        featured=upload(featured),
        feature_slots=Slots(upload(feature_block), upload(feature_offset)),
        out=upload(out),
        out_lens=[len(part) for part in out],
        read=upload(read),
        head=upload([np.searchsorted(last_rows, head_rows)]),
    )


def _budget(stream: Stream) -> int:
    """Rows to choose by similarity: rows of new tokens are forced and count against the plan's budget."""
    budget = stream.plan.budget or 0
    if stream.reuse.force_changed:
        start, end = stream.plan.forced
        inside = (stream.changed >= stream.plan.live[0]) & ((stream.changed < start) | (stream.changed >= end))
        budget = max(0, budget - int(inside.sum()))
    return budget
