"""Packs streams into the batch of a forward: live rows and the slots of their caches.

All arrays are created on the host and sent to the device in one transfer, see upload.py.
"""

from collections.abc import Iterator
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import torch

from vllm_dlm.cache.blocks import Slots
from vllm_dlm.cache.budget import BlockShape
from vllm_dlm.canvas.stream import Stream, among
from vllm_dlm.plugins.reuse.flow import Columns, Rows
from vllm_dlm.step.batch import Batch, Group, Limits, RowFlags, RowNumbers, Starts, UncapturedRows
from vllm_dlm.step.selection_packing import group_selection
from vllm_dlm.step.upload import Upload

#: vLLM's null block, which no request owns; pads block tables
NULL_BLOCK = 0
#: On a GPU, waiting for the number of selected rows costs as much as a layer, and this many rows take hardly longer
#: than a few. Up to this size all candidate rows are computed, and unselected rows keep their old values.
MASKED_ROWS = 512


def split(streams: list[Stream], max_rows: int) -> list[list[Stream]]:
    """Forwards of at most `max_rows` rows. Streams are not split, so a forward may have more rows in a single
    stream."""
    forwards: list[list[Stream]] = [[]]
    rows = 0
    for stream in streams:
        if forwards[-1] and rows + stream.num_rows > max_rows:
            forwards.append([])
            rows = 0
        forwards[-1].append(stream)
        rows += stream.num_rows
    return forwards


def pack(
    streams: list[Stream], upload: Upload, shape: BlockShape, masks: bool | None = None, limits: Limits | None = None
) -> Batch:
    """`streams` must be sorted by kind. `masks`: see Group; None: chosen for the device. `limits`: for captured steps,
    where addresses may depend only on the number of rows, streams and leading rows"""
    packings, start = [], 0
    for _, members in groupby(streams, key=lambda stream: stream.kind):
        packings.append(GroupPacking(list(members), start, shape))
        start = packings[-1].span.stop
    numbers = upload(joined([packing.numbers() for packing in packings]), "row numbers")
    flags = upload(joined([packing.flags() for packing in packings]), "row flags")
    if masks is None:
        masks = upload.device.type != "cpu" and start <= MASKED_ROWS
    groups = [
        packing.group(RowNumbers(*numbers[:, packing.span]), RowFlags(*flags[:, packing.span]), upload, masks, limits)
        for packing in packings
    ]
    columns = RowNumbers(*numbers)
    return Batch(columns.ids, columns.position, Slots(columns.block, columns.offset), upload.nowhere, groups)


def joined(tables: list[np.ndarray]) -> np.ndarray:
    return tables[0] if len(tables) == 1 else np.concatenate(tables, axis=1)


class GroupPacking:
    """The rows of streams of one kind, on the host."""

    def __init__(self, streams: list[Stream], start: int, shape: BlockShape):
        self.streams, self.block_size = streams, shape.block_size
        self.reuse = streams[0].reuse
        self.feature_width = self.reuse.feature_width(shape.row)
        self.features_per_block = shape.features_per_block(self.reuse)
        self.sizes = [stream.num_rows for stream in streams]
        self.starts = np.zeros(len(streams) + 1, np.int64)
        np.cumsum(self.sizes, out=self.starts[1:])
        self.span = slice(start, start + int(self.starts[-1]))
        live = [stream.plan.live for stream in streams]
        self.live = live[0] if len(live) == 1 else np.concatenate(live)  # [T]
        self.head = self._marked([among(s.plan.live, s.head_positions) for s in streams])
        self.forced = self._marked([s.forced for s in streams])
        self.changed = self._marked([among(s.plan.live, s.changed) for s in streams])
        self.response = self.live >= np.repeat([s.response[0] for s in streams], self.sizes)

    def _marked(self, places: list[np.ndarray]) -> np.ndarray:
        """[T] bool: rows at these indices of the live rows of each stream"""
        mask = np.zeros(len(self.live), np.bool_)
        for start, place in zip(self.starts.tolist(), places, strict=False):
            mask[start + place] = True
        return mask

    def _spans(self) -> Iterator[tuple[slice, Stream]]:
        for start, stream in zip(self.starts.tolist(), self.streams, strict=False):
            yield slice(start, start + stream.num_rows), stream

    @cached_property
    def kept(self) -> np.ndarray:
        """[T] bool: rows that keep features"""
        first = [len(s.token_ids) - s.feature_rows if s.feature_rows else len(s.token_ids) for s in self.streams]
        return self.live >= np.repeat(first, self.sizes)

    def numbers(self) -> np.ndarray:
        """[8, T] int64, see RowNumbers"""
        table = np.empty((len(RowNumbers._fields), len(self.live)), np.int64)
        rows = RowNumbers(*table)
        rows.place[:], rows.position[:], rows.feature_block[:], rows.feature_offset[:] = self.live, self.live, -1, 0
        rows.stream[:] = np.repeat(np.arange(len(self.streams)), self.sizes)
        rows.offset[:] = self.live % self.block_size
        for own, stream in self._spans():
            live = stream.plan.live
            rows.ids[own] = stream.token_ids[live]
            written = stream.kv_table if stream.hidden_row is None else None  # shadows write nothing
            rows.block[own] = -1 if written is None else written[live // self.block_size]
            if stream.last is not None and len(live) and live[-1] == len(stream.token_ids) - 1:
                rows.position[own.stop - 1] = stream.last
            if stream.positions is not None:
                rows.position[own] = stream.positions[rows.position[own]]
            if stream.feature_rows:
                place = own.start + np.flatnonzero(self.kept[own])
                number = self.live[place] - (len(stream.token_ids) - stream.feature_rows)
                rows.feature_block[place] = stream.feature_table[number // self.features_per_block]
                rows.feature_offset[place] = number % self.features_per_block
        return table

    def flags(self) -> np.ndarray:
        """[4, T] bool, see RowFlags"""
        chooses = np.repeat([s.chooses for s in self.streams], self.sizes)
        return np.stack(RowFlags(self.forced, self.changed, self.response & chooses, self.head))

    def group(self, numbers: RowNumbers, flags: RowFlags, upload: Upload, masks: bool, limits: Limits | None) -> Group:
        first, kv_lens = self.streams[0], [stream.num_keys for stream in self.streams]
        # The last layer's features of prompt rows are only read by prompt rows.
        wanted = self.head | (self.response & self.kept)
        sets = np.stack([np.ones(len(self.live), np.bool_), self.forced, self.response, wanted, self.head])  # [5, T]
        counts, leading = self._counts(sets), [stream.leading for stream in self.streams]
        table = np.zeros((len(Starts._fields), len(self.streams) + 1), np.int32)
        np.cumsum([*counts, leading, kv_lens], axis=1, out=table[:-1, 1:])
        table[-1, :-1] = kv_lens
        starts = Starts(*upload(table, "starts"))
        keys = [stream.selected for stream in self.streams if stream.selected]
        before: list[Any] = self._counts(sets & ~self.response).tolist() if keys else [None] * len(sets)
        rows = [
            self._rows(*each, upload, limits)
            for each in zip(sets, counts.tolist(), starts[: len(sets)], before, strict=True)
        ]
        selection = group_selection(keys, self.sizes, before[0], first.whole, upload) if keys else None
        blocks, tables = self._tables(upload, limits)
        drafted = [upload(stream.drafted) for stream in self.streams if stream.drafted is not None]
        return Group(
            reuse=self.reuse,
            whole=first.whole,
            filtered=first.filtered,
            cached=first.cached,
            selection=selection,
            span=self.span,
            row_places=numbers.place,
            stream=numbers.stream,
            columns=Columns(flags.forced, flags.changed, flags.fresh),
            voters=flags.head,
            kv_lens=kv_lens,
            key_starts=starts.keys,
            key_counts=starts.key_counts[:-1],
            table=blocks,
            tables=tables,
            feature_width=self.feature_width,
            feature_slots=Slots(numbers.feature_block, numbers.feature_offset),
            all_keep=bool(self.kept.all()),
            all=rows[0],
            forced=rows[1],
            response=rows[2],
            # a captured whole step returns all rows
            wanted=rows[0] if limits and first.whole else rows[3],
            head=rows[4],
            leading_counts=leading,
            leading_starts=starts.leading,
            masks=masks,
            hidden_row=first.hidden_row,
            drafted=drafted if first.drafted is not None else None,
            max_q=limits.max_q if limits else max(self.sizes),
            max_kv=limits.max_kv if limits else max(kv_lens),
        )

    def _counts(self, sets: np.ndarray) -> np.ndarray:
        """sets [n, T] bool -> [n, C] number of rows of each stream"""
        before = np.zeros((len(sets), len(self.live) + 1), np.int64)
        np.cumsum(sets, axis=1, out=before[:, 1:])
        before = before[:, self.starts]
        return before[:, 1:] - before[:, :-1]

    def _rows(
        self,
        mask: np.ndarray,
        counts: list[int],
        starts: torch.Tensor,
        before: list[int] | None,
        upload: Upload,
        limits: Limits | None,
    ) -> Rows:
        if sum(counts) == len(mask):
            return Rows(None, counts, starts, before=before)
        if limits is not None:
            return UncapturedRows(counts, starts)
        return Rows(upload(np.flatnonzero(mask)), counts, starts, before=before)

    def _tables(self, upload: Upload, limits: Limits | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        own = [stream.kv_table for stream in self.streams if stream.kv_table is not None]
        if not own:
            return upload(np.zeros((0, 0), np.int32), "block table"), []
        table = np.full((len(own), limits.blocks if limits else max(map(len, own))), NULL_BLOCK, np.int32)
        for row, blocks in zip(table, own, strict=True):
            row[: len(blocks)] = blocks
        if limits:  # captured steps use kernels that read the table
            return upload(table, "block table"), []
        tables: list[torch.Tensor] = []
        for number, blocks in enumerate(own):
            same = number and blocks is own[number - 1]  # streams of one canvas may share a table
            tables.append(tables[-1] if same else upload(blocks))
        return upload(table), tables
