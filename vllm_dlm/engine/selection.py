"""The keys that the streams of a group attend to under a selection: chosen together, attended to together.

Everything that the host knows of a step is prepared before the forward, see selection_packing.py. In a layer nothing is
read back and nothing depends on the number of streams: which rows belong to which stream follows from their indices
among the live rows, which only the device may know.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vllm_dlm.cache.blocks import KVBlocks, Slots
from vllm_dlm.engine.counts import Counts
from vllm_dlm.engine.selected_keys import SelectedKeys
from vllm_dlm.kernels.sparse_attention import listed, sparse_attention, sparse_delta
from vllm_dlm.plugins.reuse.flow import Rows
from vllm_dlm.plugins.selection.base import Asked, CachedPrompts, Held, Selection, Summaries


@dataclass
class Choosers:
    """The streams that choose in this step, B of the group's."""

    keys: list[SelectedKeys]
    most: int  # upper bound on rows of a response
    bounds: torch.Tensor  # [2, B] live rows where each response starts and ends
    tables: torch.Tensor  # [B, blocks]
    summaries: torch.Tensor  # [B, blocks] of the summaries
    described: torch.Tensor  # [B] number of summaries
    numbers: torch.Tensor  # [M, B], see PromptUnits
    slots: torch.Tensor  # [B] in the pool
    known: torch.Tensor  # [B] bool: the pool has a choice of the same keys


@dataclass
class NewKeys:
    """Prompts that are summarised from the keys of this step, which recomputes every row."""

    rows: slice | torch.Tensor  # rows of the group
    lens: list[int]  # number of them per stream
    summaries: Slots


@dataclass
class FinalKeys:
    """Keys that are in the cache for good and have no summaries yet."""

    keys: Slots
    lens: list[int]  # number of them per stream
    summaries: Slots


@dataclass
class VisibleUnits:
    """What the responses read of the prompts in one layer."""

    units: torch.Tensor  # [C or slots of the pool, Hkv, K] int32, padded with -1
    rows: torch.Tensor | None  # [C] row of each stream; None: its number


@dataclass
class GroupSelection:
    """The selection of the C streams of a group, and the keys of each."""

    keys: list[SelectedKeys]
    prompt_rows: list[int]  # live rows of each stream before its response
    bounds: torch.Tensor  # [2, C] live rows where each response starts and ends
    tables: torch.Tensor  # [C, blocks], any block beyond a stream
    lengths: torch.Tensor  # [C] keys
    free: torch.Tensor  # [C] int32: units from here on are always visible
    slots: torch.Tensor  # [C] in the pool
    choosers: Choosers | None
    new: NewKeys | None
    final: FinalKeys | None
    _visible: tuple[int, VisibleUnits] | None = None  # the layer whose choice was made last, and the choice

    @property
    def selection(self) -> Selection:
        return self.keys[0].selection

    def sees_all(self, layer: int) -> bool:
        return self.selection.sees_all(layer)

    # -- rows ------------------------------------------------------------------------------

    def prompts_of(self, rows: Rows) -> list[int]:
        """Number of rows that belong to each prompt; an upper bound if only the device knows which rows these are"""
        if rows.before is not None:
            return rows.before
        return [min(pair) for pair in zip(self.prompt_rows, rows.counts, strict=True)]

    def _spans(self, rows: Rows) -> tuple[torch.Tensor, ...]:
        """[C] starts and ends of each response among these rows"""
        if rows.index is not None and rows.starts is not None and not any(self.prompt_rows):
            return rows.starts[:-1], rows.starts[1:]
        return rows.once("responses", lambda index: torch.searchsorted(index, self.bounds), self.bounds).unbind()

    # -- summaries -------------------------------------------------------------------------

    def refresh(self, layer: int, blocks: KVBlocks, keys: torch.Tensor, counts: Counts) -> None:
        """The prompts have new keys in this layer, [T, Hkv, D] those of all rows."""
        for own in self.keys:
            own.refreshed()
        if self.new is None or self.sees_all(layer):
            return
        self._summarise(layer, blocks, keys[self.new.rows], self.new.lens, self.new.summaries)
        counts.summaries += sum(own.units.summaries for own in self.keys)

    def summarise_final(self, layer: int, blocks: KVBlocks, counts: Counts) -> None:
        """Summarises keys that earlier steps have written and no later step changes."""
        if self.final is None or self.sees_all(layer):
            return
        keys = blocks.read_keys(layer, self.final.keys)
        self._summarise(layer, blocks, keys, self.final.lens, self.final.summaries)
        counts.summaries += len(self.final.summaries.block)

    def _summarise(self, layer: int, blocks: KVBlocks, keys: torch.Tensor, lens: list[int], slots: Slots) -> None:
        dim = keys.shape[2]
        first, second = (
            F.pad(vectors, (0, dim - vectors.shape[2])).to(keys.dtype)
            for vectors in self.selection.summarise(keys, lens)
        )
        blocks.write_keys(layer, slots, first)
        blocks.write_values(layer, slots, second)

    # -- choosing --------------------------------------------------------------------------

    def visible(
        self, layer: int, blocks: KVBlocks, q: torch.Tensor, rows: Rows, voters: torch.Tensor, scale: float,
        counts: Counts,
    ) -> VisibleUnits:  # fmt: skip
        """What the responses read of the prompts; `voters` [T] of all live rows"""
        if self._visible is None or self._visible[0] != layer:
            self._visible = layer, self._chosen(layer, blocks, q, rows, voters, scale, counts)
        return self._visible[1]

    def visible_in(self, layer: int) -> VisibleUnits | None:
        """The choice of this layer, if it is the last one that was made"""
        return None if self._visible is None or self._visible[0] != layer else self._visible[1]

    def units(self, visible: VisibleUnits) -> torch.Tensor:
        """-> [C, Hkv, K] all visible units, those after the prompt included"""
        return listed(visible.units, self.lengths, self.selection.unit, visible.rows, self.free, self.tail)

    @property
    def tail(self) -> int:
        return max(own.tail for own in self.keys)

    def _chosen(self, layer, blocks, q, rows, voters, scale, counts) -> VisibleUnits:
        if self.choosers is not None:
            asked = self.asked(layer, blocks, q, rows, voters, scale)
            choice = self.selection.choose(asked)
            counts.keys_scored += choice.scored
            if choice.units is not None:
                if asked.prompts is None or asked.prompts.held is None:
                    return VisibleUnits(choice.units, None)
                asked.prompts.held.put(choice.units)
        units, _ = self.keys[0].pool.tensors(layer, blocks.layers[layer].shape[1], q.device)
        return VisibleUnits(units[..., : max(own.units.kept for own in self.keys)], self.slots)

    def asked(
        self, layer: int, blocks: KVBlocks, q: torch.Tensor, rows: Rows, voters: torch.Tensor, scale: float
    ) -> Asked:
        """What the selection chooses by"""
        choosers, cache, dim = self.choosers, blocks.layers[layer], q.shape[2]
        assert choosers is not None
        for own, count in zip(self.keys, rows.counts, strict=True):
            if own.chooses and not count:
                own.refreshed()
        (first, _), (second, _) = self.selection.vectors(dim, cache.dtype)
        prompts = CachedPrompts(
            cache, choosers.tables, [own.prompt_len for own in choosers.keys], [own.length for own in choosers.keys],
            choosers.numbers, scale, rows.once("voters", lambda index: voters[index], voters),
            self._held(layer, cache, choosers),
        )  # fmt: skip
        if choosers.bounds is self.bounds:
            starts, ends = self._spans(rows)
        else:
            found = rows.once("choosers", lambda index: torch.searchsorted(index, choosers.bounds), choosers.bounds)
            starts, ends = found.unbind()
        return Asked(
            q, starts, ends, min(choosers.most, max(rows.counts)),
            Summaries(cache[..., :first], cache[..., dim : dim + second]), choosers.summaries, choosers.described,
            prompts,
        )  # fmt: skip

    def _held(self, layer: int, cache: torch.Tensor, choosers: Choosers) -> Held | None:
        if not self.keys[0].remembers:
            return None
        units, memo = self.keys[0].pool.tensors(layer, cache.shape[1], cache.device)
        return Held(units, memo, choosers.slots, choosers.known)

    # -- attention -------------------------------------------------------------------------

    def attend(
        self, layer: int, blocks: KVBlocks, q: torch.Tensor, rows: Rows, voters: torch.Tensor, scale: float,
        counts: Counts, out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Queries [n, H, D] of responses over visible keys -> [n, H, D]; rows of prompts keep their values in `out`"""
        visible = self.visible(layer, blocks, q, rows, voters, scale, counts)
        self._count(rows, counts)
        starts, ends = self._spans(rows)
        unit, cache = self.selection.unit, blocks.layers[layer]
        return sparse_attention(
            q, starts, cache, self.tables, visible.units, self.lengths, unit, scale, False, ends,
            cache.shape[2] // unit, out, visible.rows, self.free, self.tail,
        )  # fmt: skip

    def delta(
        self, layer: int, blocks: KVBlocks, q: torch.Tensor, rows: Rows, voters: torch.Tensor, scale: float,
        counts: Counts, moved: torch.Tensor, places: torch.Tensor, out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """What `moved` values [S, Hkv, D] add to contexts over visible keys; `places` [C, longest stream]: index of the
        moved value of a position, -1: none"""
        visible = self.visible(layer, blocks, q, rows, voters, scale, counts)
        self._count(rows, counts)
        starts, ends = self._spans(rows)
        unit, cache = self.selection.unit, blocks.layers[layer]
        return sparse_delta(
            q, starts, ends, cache, self.tables, visible.units, self.lengths, unit, scale, moved, places,
            cache.shape[2] // unit, out, visible.rows, self.free, self.tail,
        )  # fmt: skip

    def _count(self, rows: Rows, counts: Counts) -> None:
        own = [count - prompt for count, prompt in zip(rows.counts, self.prompts_of(rows), strict=True)]
        counts.attended(own, [k.visible for k in self.keys], read=True, dense=[k.length for k in self.keys])
