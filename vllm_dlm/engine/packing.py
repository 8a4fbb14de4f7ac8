"""Canvases packed into one forward without padding: who the live rows are and where their caches lie.

Rows (queries), positions of a canvas (keys) and requests are three index
spaces and stay apart: a row knows its canvas, its position and its slots.
Canvases that are treated alike, same policy and same kind of step, form a
group of consecutive rows. Everything a forward must know is made here, on the
host, and goes to the device in one transfer.
"""

from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch

from vllm_dlm.cache.blocks import Slots
from vllm_dlm.cache.budget import BlockShape
from vllm_dlm.engine.group import Group, Packed, UnknownRows
from vllm_dlm.engine.selecting import Selecting, selecting
from vllm_dlm.engine.stream import Stream, among
from vllm_dlm.engine.upload import Upload
from vllm_dlm.plugins.reuse.flow import Columns, Rows

#: vLLM's null block, which no request owns: pads the tables of canvases that have fewer blocks than others
NULL_BLOCK = 0
#: On a GPU so many rows take hardly longer than a few, and waiting until the host knows how many a policy found
#: takes as long as a layer: up to here all are computed and the ones that were not meant are left as they are.
MASKED_ROWS = 512


class Limits(NamedTuple):
    """Upper bounds for all steps that replay one captured step"""

    max_q: int  # rows of a canvas
    max_kv: int  # its positions
    blocks: int  # width of the tables


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


def pack(
    streams: list[Stream], upload: Upload, shape: BlockShape, masks: bool | None = None, limits: Limits | None = None
) -> Packed:
    """`streams` come sorted by kind. `masks`: see Group; None: what is best on the device. `limits`: where everything
    lies must not depend on more than the number of rows, canvases and leading rows, see captured.py"""
    packings, start = [], 0
    for _, members in groupby(streams, key=lambda s: s.kind):
        packing = Packing(list(members), start, shape)
        packings.append(packing)
        start = packing.span.stop
    # One table for all groups, [8, T]: ids, places and positions in their canvases, canvases, slots of keys and values,
    # and of features; flags, [4, T]
    numbers = upload(joined([packing.numbers for packing in packings]))
    flags = upload(joined([packing.flags for packing in packings]))
    if masks is None:
        masks = upload.device.type != "cpu" and start <= MASKED_ROWS
    groups = [p.group(numbers[:, p.span], flags[:, p.span], upload, masks, limits) for p in packings]
    ids, _, positions, _, block, offset, _, _ = numbers.unbind(0)
    return Packed(ids, positions, Slots(block, offset), upload.nowhere, groups)


def joined(tables: list[np.ndarray]) -> np.ndarray:
    return tables[0] if len(tables) == 1 else np.concatenate(tables, axis=1)


class Packing:
    """Of canvases of one kind, on the host."""

    def __init__(self, streams: list[Stream], start: int, shape: BlockShape):
        self.streams, self.block_size = streams, shape.block_size
        self.reuse = streams[0].reuse
        self.feature_width = self.reuse.feature_width(shape.row)
        self.features_per_block = shape.features_per_block(self.reuse)
        sizes = [s.num_rows for s in streams]
        self.starts = np.zeros(len(sizes) + 1, np.int64)
        np.cumsum(sizes, out=self.starts[1:])
        self.sizes, self.span = sizes, slice(start, start + int(self.starts[-1]))
        live = [s.plan.live for s in streams]
        self.live = live[0] if len(live) == 1 else np.concatenate(live)
        self.heads = self._flag([among(s.plan.live, s.head_positions) for s in streams])
        self.forced = self._flag([s.forced for s in streams])
        self.changed = self._flag([among(s.plan.live, s.changed) for s in streams])
        self.response = self.live >= np.repeat([s.response[0] for s in streams], sizes)

    def _flag(self, places: list[np.ndarray]) -> np.ndarray:
        """[T] bool: rows at these places of their canvases"""
        mask = np.zeros(len(self.live), np.bool_)
        for start, place in zip(self.starts.tolist(), places, strict=False):
            mask[start + place] = True
        return mask

    @property
    def numbers(self) -> np.ndarray:
        """[8, T] int64"""
        table = np.empty((8, len(self.live)), np.int64)
        table[1], table[2], table[6], table[7] = self.live, self.live, -1, 0
        for start, stream in zip(self.starts.tolist(), self.streams, strict=False):
            own = slice(start, start + stream.num_rows)
            live = stream.plan.live
            table[0, own] = stream.token_ids[live]
            written = stream.kv_table if stream.hidden_row is None else None
            table[4, own] = -1 if written is None else written[live // self.block_size]
            if stream.last is not None and len(live) and live[-1] == len(stream.token_ids) - 1:
                table[2, own.stop - 1] = stream.last
            if stream.positions is not None:
                table[2, own] = stream.positions[table[2, own]]
            if stream.feature_rows:
                place = start + np.flatnonzero(self.kept[own])
                row = self.live[place] - (len(stream.token_ids) - stream.feature_rows)
                table[6, place] = stream.feature_table[row // self.features_per_block]
                table[7, place] = row % self.features_per_block
        table[3] = np.repeat(np.arange(len(self.streams)), self.sizes)
        table[5] = self.live % self.block_size
        return table

    @cached_property
    def kept(self) -> np.ndarray:
        """[T] bool: rows that keep features"""
        first = [len(s.token_ids) - s.feature_rows if s.feature_rows else len(s.token_ids) for s in self.streams]
        return self.live >= np.repeat(first, self.sizes)

    @property
    def flags(self) -> np.ndarray:
        """[4, T] bool"""
        chooses = np.repeat([s.chooses for s in self.streams], self.sizes)
        return np.stack([self.forced, self.changed, self.response & chooses, self.heads])

    def group(
        self, numbers: torch.Tensor, flags: torch.Tensor, upload: Upload, masks: bool, limits: Limits | None
    ) -> Group:
        streams, cached = self.streams, self.streams[0].cached
        # Only prompt rows themselves would read the last layer's features of prompt rows.
        wanted = self.heads | (self.response & self.kept)
        everything = np.ones(len(self.live), np.bool_)
        masks_T = np.stack([everything, self.forced, self.response, wanted, self.heads])
        counts = self._counts(masks_T)
        leading, kv_lens = [stream.leading for stream in streams], [len(s.token_ids) for s in streams]
        starts = np.zeros((8, len(streams) + 1), np.int32)
        np.cumsum([*counts, leading, kv_lens], axis=1, out=starts[:7, 1:])
        starts[7, :-1] = kv_lens
        on_device = upload(starts)
        *begins, leading_starts, _, _ = on_device.unbind(0)
        rows = [self._rows(*each, upload, limits) for each in zip(masks_T, counts.tolist(), begins, strict=True)]
        table, tables = self._tables(upload, limits) if cached else (upload(np.zeros((0, 0), np.int32)), [])
        forced, changed, fresh, heads = flags.unbind(0)
        _, places, _, canvas, _, _, feature_block, feature_offset = numbers.unbind(0)
        return Group(
            reuse=self.reuse,
            whole=streams[0].whole,
            filtered=streams[0].filtered,
            cached=cached,
            selecting=self._selecting(rows, masks_T, upload),
            span=self.span,
            row_places=places,
            canvas=canvas,
            columns=Columns(forced, changed, fresh),
            voters=heads,
            kv_lens=kv_lens,
            kv_ends=on_device[6:],
            table=table,
            tables=tables,
            feature_width=self.feature_width,
            feature_slots=Slots(feature_block, feature_offset),
            all_keep=bool(self.kept.all()),
            all=rows[0],
            forced=rows[1],
            response=rows[2],
            # Rows that are few where the host knows them
            wanted=rows[0] if limits and streams[0].whole else rows[3],
            head=rows[4],
            leading=(leading, leading_starts),
            masks=masks,
            hidden_row=streams[0].hidden_row,
            max_q=limits.max_q if limits else max(self.sizes),
            max_kv=limits.max_kv if limits else max(kv_lens),
        )

    def _counts(self, masks: np.ndarray) -> np.ndarray:
        """masks [n, T] -> [n, C] true rows of each canvas"""
        before = np.zeros((len(masks), len(self.live) + 1), np.int64)
        np.cumsum(masks, axis=1, out=before[:, 1:])
        before = before[:, self.starts]
        return before[:, 1:] - before[:, :-1]

    def _rows(self, mask: np.ndarray, counts: list[int], starts: torch.Tensor, upload: Upload, limits) -> Rows:
        if sum(counts) == len(mask):
            return Rows(None, counts, starts)
        if limits is not None:
            return UnknownRows(None, counts, starts)
        return Rows(upload(np.flatnonzero(mask)), counts, starts)

    def _selecting(self, rows: list[Rows], masks: np.ndarray, upload: Upload) -> Selecting | None:
        """`masks` [n, T]: which rows each set has"""
        views = [s.selected for s in self.streams if s.selected]
        if not views:
            return None
        of_prompts = self._counts(masks & ~self.response).tolist()
        made = selecting(views, self.sizes, of_prompts[0], self.streams[0].whole, upload)
        for own, prompts in zip(rows, of_prompts, strict=True):
            made.knows(own, prompts)
        return made

    def _tables(self, upload: Upload, limits: Limits | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        own = [s.kv_table for s in self.streams if s.kv_table is not None]
        table = np.full((len(own), limits.blocks if limits else max(map(len, own))), NULL_BLOCK, np.int32)
        for row, blocks in zip(table, own, strict=True):
            row[: len(blocks)] = blocks
        # Kernels that read tables need no list of them, and their sizes are those of this step alone.
        if limits:
            return upload(table), []
        once = {id(blocks): upload(blocks) for blocks in own}  # parts of a canvas have one table
        return upload(table), [once[id(blocks)] for blocks in own]
