"""Selected keys of a group: chooses and attends for all streams of the group at once.

The host prepares its data before the forward, see selection_packing.py. A layer reads nothing back from the device.
Which rows belong to which stream follows from their indices among the live rows, which may be known only on the device.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from vllm_dlm.cache.blocks import KVBlocks, Slots
from vllm_dlm.canvas.selected_keys import SelectedKeys
from vllm_dlm.kernels.packed_attention import PackedCache
from vllm_dlm.kernels.sparse_attention import listed, sparse_attention, sparse_delta
from vllm_dlm.plugins.reuse.flow import Rows
from vllm_dlm.plugins.selection.base import CachedPrompts, ChoiceQuery, Selection, StoredChoices, Summaries
from vllm_dlm.step.counts import Counts


@dataclass
class Choosers:
    """The B streams of the group that choose in this step."""

    keys: list[SelectedKeys]
    most: int  # upper bound on rows of a response
    bounds: torch.Tensor  # [2, B] live rows where each response starts and ends
    tables: torch.Tensor  # [B, blocks]
    summaries: torch.Tensor  # [B, blocks] blocks of the summaries
    described: torch.Tensor  # [B] number of summaries
    numbers: torch.Tensor  # [M, B], see PromptUnits
    slots: torch.Tensor  # [B] slots in the pool
    known: torch.Tensor  # [B] bool: the pool has an earlier choice from the same keys


@dataclass
class NewKeys:
    """Prompts to summarise from the keys of this step, which recomputes every row."""

    rows: slice | torch.Tensor  # rows of the group
    lens: list[int]  # number of them per stream
    summaries: Slots


@dataclass
class FinalKeys:
    """Final cached keys without summaries."""

    keys: Slots
    lens: list[int]  # number of them per stream
    summaries: Slots


@dataclass
class VisibleUnits:
    """Units of the prompts that the responses read in one layer."""

    units: torch.Tensor  # [C or slots of the pool, Hkv, K] int32, padded with -1
    rows: torch.Tensor | None  # [C] row of each stream in `units`; None: the index of the stream


class ResponseQueries(NamedTuple):
    """Queries of a group in one layer, and the cache that they attend to."""

    layer: int
    blocks: KVBlocks
    q: torch.Tensor  # [n, H, D]
    rows: Rows  # [n]
    voters: torch.Tensor  # [T] bool for all live rows: a token is read there
    scale: float
    counts: Counts

    @property
    def cache(self) -> torch.Tensor | PackedCache:
        """[blocks, Hkv, block_size, 2 * D], keys before values"""
        return self.blocks.caches[self.layer]


@dataclass
class GroupSelection:
    """The selection of the C streams of a group, and the keys of each."""

    keys: list[SelectedKeys]
    prompt_rows: list[int]  # live rows of each stream before its response
    bounds: torch.Tensor  # [2, C] live rows where each response starts and ends
    tables: torch.Tensor  # [C, blocks], padded with any block
    lengths: torch.Tensor  # [C] number of keys
    free: torch.Tensor  # [C] int32: first unit that is always visible, as are all later ones
    slots: torch.Tensor  # [C] slots in the pool
    choosers: Choosers | None
    new: NewKeys | None
    final: FinalKeys | None
    _visible: tuple[int, VisibleUnits] | None = None  # the last choice and its layer

    @property
    def selection(self) -> Selection:
        return self.keys[0].selection

    def sees_all(self, layer: int) -> bool:
        return self.selection.sees_all(layer)

    # -- rows ------------------------------------------------------------------------------

    def prompts_of(self, rows: Rows) -> list[int]:
        """Number of rows that belong to each prompt; an upper bound if the rows are known only on the device"""
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
        """Summarises the prompts from new keys [T, Hkv, D] of all rows, and discards earlier choices."""
        for own in self.keys:
            own.refreshed()
        if self.new is None or self.sees_all(layer):
            return
        self._summarise(layer, blocks, keys[self.new.rows], self.new.lens, self.new.summaries)
        counts.summaries += sum(own.units.summaries for own in self.keys)

    def summarise_final(self, layer: int, blocks: KVBlocks, counts: Counts) -> None:
        """Summarises final keys that earlier steps have written."""
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
        blocks.write_plain(layer, slots, first, second)

    # -- choosing --------------------------------------------------------------------------

    def visible(self, queries: ResponseQueries) -> VisibleUnits:
        """Units of the prompts that the responses read; chosen once per layer"""
        if self._visible is None or self._visible[0] != queries.layer:
            self._visible = queries.layer, self._chosen(queries)
        return self._visible[1]

    def visible_in(self, layer: int) -> VisibleUnits | None:
        """The choice of this layer, if it is the last one"""
        return None if self._visible is None or self._visible[0] != layer else self._visible[1]

    def units(self, visible: VisibleUnits) -> torch.Tensor:
        """-> [C, Hkv, K] all visible units, including those after the prompt"""
        return listed(visible.units, self.lengths, self.selection.unit, visible.rows, self.free, self.tail)

    @property
    def tail(self) -> int:
        return max(own.tail for own in self.keys)

    def _chosen(self, queries: ResponseQueries) -> VisibleUnits:
        if self.choosers is not None:
            asked = self.asked(queries)
            choice = self.selection.choose(asked)
            queries.counts.keys_scored += choice.scored
            if choice.units is not None:
                if asked.prompts is None or asked.prompts.held is None:
                    return VisibleUnits(choice.units, None)
                asked.prompts.held.put(choice.units)
        units, _ = self.keys[0].pool.tensors(queries.layer, queries.cache.shape[1], queries.q.device)
        return VisibleUnits(units[..., : max(own.units.kept for own in self.keys)], self.slots)

    def asked(self, queries: ResponseQueries) -> ChoiceQuery:
        """Input of the selection's `choose`"""
        choosers, cache, rows, dim = self.choosers, queries.cache, queries.rows, queries.q.shape[2]
        assert choosers is not None
        for own, count in zip(self.keys, rows.counts, strict=True):
            if own.chooses and not count:
                own.refreshed()
        (first, _), (second, _) = self.selection.vectors(dim, cache.dtype)
        prompts = CachedPrompts(
            cache,
            choosers.tables,
            prompt_lens=[own.prompt_len for own in choosers.keys],
            lengths=[own.length for own in choosers.keys],
            numbers=choosers.numbers,
            scale=queries.scale,
            voters=rows.once("voters", lambda index: queries.voters[index], queries.voters),
            held=self._held(queries.layer, cache, choosers),
        )
        if choosers.bounds is self.bounds:
            starts, ends = self._spans(rows)
        else:
            found = rows.once("choosers", lambda index: torch.searchsorted(index, choosers.bounds), choosers.bounds)
            starts, ends = found.unbind()
        plain = queries.blocks.layers[queries.layer]
        summaries = Summaries(plain[..., :first], plain[..., dim : dim + second])
        most = min(choosers.most, max(rows.counts))
        return ChoiceQuery(queries.q, starts, ends, most, summaries, choosers.summaries, choosers.described, prompts)

    def _held(self, layer: int, cache: torch.Tensor | PackedCache, choosers: Choosers) -> StoredChoices | None:
        if not self.keys[0].remembers:
            return None
        units, memo = self.keys[0].pool.tensors(layer, cache.shape[1], cache.device)
        return StoredChoices(units, memo, choosers.slots, choosers.known)

    # -- attention -------------------------------------------------------------------------

    def attend(self, queries: ResponseQueries, out: torch.Tensor | None = None) -> torch.Tensor:
        """Contexts over visible keys, [n, H, D]; rows of prompts keep their values in `out`"""
        visible, unit = self.visible(queries), self.selection.unit
        self._count(queries)
        starts, ends = self._spans(queries.rows)
        return sparse_attention(
            queries.q, starts, queries.cache, self.tables, visible.units, self.lengths, unit, queries.scale, False,
            ends, queries.cache.shape[2] // unit, out, visible.rows, self.free, self.tail,
        )  # fmt: skip

    def delta(
        self, queries: ResponseQueries, moved: torch.Tensor, places: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Change of contexts over visible keys caused by changed values. `moved` [S, Hkv, D]: by how much; `places` [C,
        longest stream]: index of a position in `moved`, -1: unchanged"""
        visible, unit = self.visible(queries), self.selection.unit
        self._count(queries)
        starts, ends = self._spans(queries.rows)
        return sparse_delta(
            queries.q, starts, ends, queries.cache, self.tables, visible.units, self.lengths, unit, queries.scale,
            moved, places, queries.cache.shape[2] // unit, out, visible.rows, self.free, self.tail,
        )  # fmt: skip

    def _count(self, queries: ResponseQueries) -> None:
        rows = queries.rows
        own = [count - prompt for count, prompt in zip(rows.counts, self.prompts_of(rows), strict=True)]
        visible, lengths = [keys.visible for keys in self.keys], [keys.length for keys in self.keys]
        queries.counts.attended(own, visible, read=True, dense=lengths)
