"""What the canvases of a group see of their caches: chosen together, attended to together.

Everything that the host knows of a step is laid out before the forward, by
`selecting`. In a layer nothing is read back and nothing depends on how many
canvases there are: which rows belong to whom follows from where the rows of a
set stand among the live ones, which only the device may know.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from vllm_dlm.cache.blocks import KVBlocks, Slots
from vllm_dlm.engine.counts import Counts
from vllm_dlm.engine.selected_keys import SelectedKeys
from vllm_dlm.kernels.sparse_attention import listed, sparse_attention, sparse_delta
from vllm_dlm.plugins.reuse.flow import Rows
from vllm_dlm.plugins.selection.base import Asked, CachedPrompts, Held, Selection, Summaries

Upload = Callable[[np.ndarray], torch.Tensor]


@dataclass
class Choosers:
    """The canvases that choose in this step; B of the group's."""

    views: list[SelectedKeys]
    most: int  # rows of a response at most
    bounds: torch.Tensor  # [2, B] live rows where each response starts and ends
    tables: torch.Tensor  # [B, blocks]
    summaries: torch.Tensor  # [B, blocks] where the summaries lie
    described: torch.Tensor  # [B]
    numbers: torch.Tensor  # [M, B], see Selection.numbers
    slots: torch.Tensor  # [B] in the pool
    known: torch.Tensor  # [B] bool: the choice there is one of the same keys


@dataclass
class Refreshed:
    """The prompts of a group whose every row is recomputed."""

    rows: slice | torch.Tensor  # those of the group's rows that are described
    lens: list[int]  # so many of each canvas
    slots: Slots  # of the summaries


@dataclass
class Final:
    """Keys that are in the cache for good and have no summaries yet, canvas after canvas."""

    keys: Slots
    lens: list[int]  # so many of each canvas
    summaries: Slots


@dataclass
class Shown:
    """What is read of the prompts in one layer."""

    units: torch.Tensor  # [C or slots of the pool, Hkv, K] int32, -1: none
    rows: torch.Tensor | None  # [C] row of each canvas; None: its number


@dataclass
class Selecting:
    """Of the C canvases of a group."""

    views: list[SelectedKeys]
    prompt_rows: list[int]  # live rows of each canvas before its response
    bounds: torch.Tensor  # [2, C] live rows where each response starts and ends
    tables: torch.Tensor  # [C, blocks], any block beyond a canvas
    lengths: torch.Tensor  # [C] keys
    free: torch.Tensor  # [C] int32: units from here on are always visible
    slots: torch.Tensor  # [C] in the pool
    choosers: Choosers | None
    refreshed: Refreshed | None
    final: Final | None
    _shown: tuple[int, Shown] | None = None  # the layer whose choice was made last, and what it shows
    _found: dict[tuple[int, int], tuple] = field(default_factory=dict)
    _prompts: dict[int, list[int]] = field(default_factory=dict)

    @property
    def selection(self) -> Selection:
        return self.views[0].selection

    def sees_all(self, layer: int) -> bool:
        return self.selection.sees_all(layer)

    # -- rows ------------------------------------------------------------------------------

    def knows(self, rows: Rows, prompts: list[int]) -> None:
        """How many of a set's rows belong to each prompt, where the host knows."""
        self._prompts[id(rows.index)] = prompts

    def prompts_of(self, rows: Rows) -> list[int]:
        """How many rows of a set belong to each prompt; at most so many, if only the device knows which they are."""
        known = [min(pair) for pair in zip(self.prompt_rows, rows.counts, strict=True)]
        return self._prompts.get(id(rows.index), known)

    def _spans(self, rows: Rows, bounds: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Where each response's rows stand among these: [B] starts and ends"""
        if rows.index is None:
            return bounds.unbind()
        if bounds is self.bounds and rows.starts is not None and not any(self.prompt_rows):
            return rows.starts[:-1], rows.starts[1:]
        return self._once(rows.index, bounds, lambda: torch.searchsorted(rows.index, bounds)).unbind()

    def _once(self, index: torch.Tensor, of: torch.Tensor, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Several layers ask about the same rows."""
        key = id(index), id(of)
        if key not in self._found:
            self._found[key] = index, of, make()
        return self._found[key][2]

    # -- summaries -------------------------------------------------------------------------

    def refresh(self, layer: int, blocks: KVBlocks, keys: torch.Tensor, counts: Counts) -> None:
        """The prompts have new keys in this layer, [T, Hkv, D] those of all rows."""
        for view in self.views:
            view.refreshed()
        if self.refreshed is None or self.sees_all(layer):
            return
        self._describe(layer, blocks, keys[self.refreshed.rows], self.refreshed.lens, self.refreshed.slots)
        counts.summaries += sum(view.units.summaries for view in self.views)

    def describe_final(self, layer: int, blocks: KVBlocks, counts: Counts) -> None:
        """What the steps before have left in the cache and none will change."""
        if self.final is None or self.sees_all(layer):
            return
        keys = blocks.read_keys(layer, self.final.keys)
        self._describe(layer, blocks, keys, self.final.lens, self.final.summaries)
        counts.summaries += len(self.final.summaries.block)

    def _describe(self, layer: int, blocks: KVBlocks, keys: torch.Tensor, lens: list[int], slots: Slots) -> None:
        dim = keys.shape[2]
        first, second = (
            F.pad(vectors, (0, dim - vectors.shape[2])).to(keys.dtype)
            for vectors in self.selection.summarise(keys, lens)
        )
        blocks.write_keys(layer, slots, first)
        blocks.write_values(layer, slots, second)

    # -- choosing --------------------------------------------------------------------------

    def shown(
        self, layer: int, blocks: KVBlocks, q: torch.Tensor, rows: Rows, voters: torch.Tensor, scale: float,
        counts: Counts,
    ) -> Shown:  # fmt: skip
        """What the prompts show; `voters` [T] of all live rows"""
        if self._shown is None or self._shown[0] != layer:
            self._shown = layer, self._chosen(layer, blocks, q, rows, voters, scale, counts)
        return self._shown[1]

    def shown_in(self, layer: int) -> Shown | None:
        """What was looked at there, if it was looked for and this is the last layer where it was."""
        return None if self._shown is None or self._shown[0] != layer else self._shown[1]

    def units(self, shown: Shown) -> torch.Tensor:
        """-> [C, Hkv, K] written out, those outside the prompt included"""
        return listed(shown.units, self.lengths, self.selection.unit, shown.rows, self.free, self.tail)

    @property
    def tail(self) -> int:
        return max(view.tail for view in self.views)

    def _chosen(self, layer, blocks, q, rows, voters, scale, counts) -> Shown:
        choosers = self.choosers
        if choosers is not None:
            asked = self.asked(layer, blocks, q, rows, voters, scale)
            choice = self.selection.choose(asked)
            counts.keys_scored += choice.scored
            if choice.units is not None:
                if asked.prompts is None or asked.prompts.held is None:
                    return Shown(choice.units, None)
                asked.prompts.held.put(choice.units)
        units, _ = self.views[0].pool.of(layer, blocks.layers[layer].shape[1], q.device)
        return Shown(units[..., : max(view.units.kept for view in self.views)], self.slots)

    def asked(
        self, layer: int, blocks: KVBlocks, q: torch.Tensor, rows: Rows, voters: torch.Tensor, scale: float
    ) -> Asked:
        choosers, cache, dim = self.choosers, blocks.layers[layer], q.shape[2]
        assert choosers is not None
        for view, count in zip(self.views, rows.counts, strict=True):
            if view.chooses and not count:
                view.refreshed()
        if rows.index is not None:
            voters = self._once(rows.index, voters, lambda: rows.of(voters))
        (first, _), (second, _) = self.selection.vectors(dim, cache.dtype)
        prompts = CachedPrompts(
            cache, choosers.tables, [view.prompt_len for view in choosers.views],
            [view.length for view in choosers.views], choosers.numbers, scale, voters, self._held(layer, cache),
        )  # fmt: skip
        starts, ends = self._spans(rows, choosers.bounds)
        return Asked(
            q, starts, ends, min(choosers.most, max(rows.counts)),
            Summaries(cache[..., :first], cache[..., dim : dim + second]), choosers.summaries, choosers.described,
            prompts,
        )  # fmt: skip

    def _held(self, layer: int, cache: torch.Tensor) -> Held | None:
        if not self.views[0].remembers:
            return None
        units, memo = self.views[0].pool.of(layer, cache.shape[1], cache.device)
        assert self.choosers is not None
        return Held(units, memo, self.choosers.slots, self.choosers.known)

    # -- attention -------------------------------------------------------------------------

    def attend(
        self, layer: int, blocks: KVBlocks, q: torch.Tensor, rows: Rows, voters: torch.Tensor, scale: float,
        counts: Counts, out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Queries [n, H, D] of responses over what is visible -> [n, H, D], in `out` those of prompts as they were"""
        shown = self.shown(layer, blocks, q, rows, voters, scale, counts)
        self._count(rows, counts)
        starts, ends = self._spans(rows, self.bounds)
        unit, cache = self.selection.unit, blocks.layers[layer]
        return sparse_attention(
            q, starts, cache, self.tables, shown.units, self.lengths, unit, scale, False, ends,
            cache.shape[2] // unit, out, shown.rows, self.free, self.tail,
        )  # fmt: skip

    def delta(
        self, layer: int, blocks: KVBlocks, q: torch.Tensor, rows: Rows, voters: torch.Tensor, scale: float,
        counts: Counts, moved: torch.Tensor, places: torch.Tensor, out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """What `moved` values [S, Hkv, D] add to contexts over what is visible; `places` [C, longest canvas]: which of
        them a position has, -1: none"""
        shown = self.shown(layer, blocks, q, rows, voters, scale, counts)
        self._count(rows, counts)
        starts, ends = self._spans(rows, self.bounds)
        unit, cache = self.selection.unit, blocks.layers[layer]
        return sparse_delta(
            q, starts, ends, cache, self.tables, shown.units, self.lengths, unit, scale, moved, places,
            cache.shape[2] // unit, out, shown.rows, self.free, self.tail,
        )  # fmt: skip

    def _count(self, rows: Rows, counts: Counts) -> None:
        own = [count - prompt for count, prompt in zip(rows.counts, self.prompts_of(rows), strict=True)]
        counts.attended(own, [view.visible for view in self.views], read=True, dense=[v.length for v in self.views])


def selecting(
    views: list[SelectedKeys], live: Sequence[int], prompts: Sequence[int], whole: bool, upload: Upload
) -> Selecting:
    """`live` rows of each canvas in this step, of which the first `prompts` lie before its response. `whole`: every
    row of every canvas is recomputed, so that nothing holds that was chosen"""
    prompts = list(prompts)
    responses = [rows - before for rows, before in zip(live, prompts, strict=True)]
    ends = np.cumsum(live, dtype=np.int64)
    bounds = np.stack([ends - responses, ends])
    tables = [view.kv_table for view in views]
    shared = {"bounds": upload(bounds), "tables": upload(stacked(tables))}
    chooses = [i for i, view in enumerate(views) if whole or view.chooses]
    made = None
    if chooses:
        own = [views[i] for i in chooses]
        part = len(own) < len(views)
        made = Choosers(
            own,
            max(responses[i] for i in chooses),
            upload(np.ascontiguousarray(bounds[:, chooses])) if part else shared["bounds"],
            upload(stacked([tables[i] for i in chooses])) if part else shared["tables"],
            upload(stacked([view.summary_table for view in own])),
            upload(np.array([view.units.summaries for view in own], np.int32)),
            upload(np.array([view.units.numbers for view in own], np.int32).T.copy()),
            upload(np.array([view.slot for view in own], np.int64)),
            upload(np.array([view.known and not whole for view in own])),
        )
    return Selecting(
        views,
        prompts,
        **shared,
        lengths=upload(np.array([view.length for view in views], np.int32)),
        free=upload(np.array([view.free for view in views], np.int32)),
        slots=upload(np.array([view.slot for view in views], np.int64)),
        choosers=made,
        refreshed=described(views, live, upload) if whole else None,
        final=final(views, upload),
    )


def described(views: list[SelectedKeys], live: Sequence[int], upload: Upload) -> Refreshed:
    lens = [view.units.candidates for view in views]
    starts = np.cumsum([0, *live[:-1]])
    rows: slice | torch.Tensor = slice(0, lens[0])  # one canvas: nothing has to be gathered
    if len(views) > 1:
        rows = upload(np.concatenate([start + np.arange(n) for start, n in zip(starts, lens, strict=True)]))
    return Refreshed(
        rows, lens, slots_of([(view.summary_table, view.units.summaries) for view in views], views, upload)
    )


def final(views: list[SelectedKeys], upload: Upload) -> Final | None:
    new = [view for view in views if not view.described]
    for view in new:
        view.described = True
    if not new:
        return None
    lens = [view.units.candidates for view in new]
    keys = slots_of([(view.kv_table, n) for view, n in zip(new, lens, strict=True)], new, upload)
    return Final(keys, lens, slots_of([(view.summary_table, view.units.summaries) for view in new], new, upload))


def slots_of(parts: list[tuple[np.ndarray, int]], views: list[SelectedKeys], upload: Upload) -> Slots:
    """The first so many of each table of blocks"""
    size = views[0].block_size
    places = [(table, np.arange(count)) for table, count in parts]
    return Slots(
        upload(np.concatenate([table[row // size] for table, row in places])),
        upload(np.concatenate([row % size for _, row in places])),
    )


def stacked(tables: list[np.ndarray]) -> np.ndarray:
    """Of any lengths -> [B, n] int32"""
    out = np.zeros((len(tables), max(map(len, tables))), np.int32)
    for row, table in zip(out, tables, strict=True):
        row[: len(table)] = table
    return out
