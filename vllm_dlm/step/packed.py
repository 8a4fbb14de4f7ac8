"""Attention over all keys of canvases whose cache is in the layout of vLLM's CPU kernel.

The other arguments of a call only depend on the number of rows of each stream, so layers with the same numbers share
them (`Group.packed`).
"""

import torch

from vllm_dlm.cache.blocks import KVBlocks
from vllm_dlm.kernels.packed_attention import PackedCache, Plan, packed_attention, plan
from vllm_dlm.plugins.reuse.flow import Rows
from vllm_dlm.step.batch import Group


class PackedCanvases:
    """The streams of a group in one layer."""

    def __init__(self, group: Group, blocks: KVBlocks, layer: int, scale: float):
        self.group, self.blocks, self.layer, self.scale = group, blocks, layer, scale

    def over_new(self, q: torch.Tensor, rows: Rows, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See CanvasAttention. If the streams have blocks, the new keys and values are there already."""
        if self.group.cached:
            return self.over_cached(q, rows)
        cache, table, block, offset = self._own()
        cache.write(k, v, block, offset)
        return self._attended(q, rows, cache, cache, table)

    def over_cached(self, q: torch.Tensor, rows: Rows) -> torch.Tensor:
        cache = self._clean()
        return self._attended(q, rows, cache, cache, self.group.table)

    def delta(self, q: torch.Tensor, rows: Rows, changed: Rows, moved: torch.Tensor) -> torch.Tensor:
        """Attention over the changes of values, which are zero at unchanged positions"""
        if not len(changed):
            return torch.zeros_like(q)
        keys, values, (block, offset) = self.blocks.caches[self.layer], self.blocks.moved, self._slots(changed)
        assert isinstance(keys, PackedCache)
        try:
            values.write(moved, moved, block, offset)
            return self._attended(q, rows, keys, values, self.group.table)
        finally:
            nothing = torch.zeros_like(moved)
            values.write(nothing, nothing, block, offset)

    @property
    def apart(self) -> bool:
        """Whether no two streams share a block, so that each changed value belongs to one stream"""
        known = self.group.packed
        if "apart" not in known:
            streams = zip(self.group.tables, self.group.kv_lens, strict=True)
            used = torch.cat([table[: -(-length // self._size)] for table, length in streams])
            known["apart"] = len(used.unique()) == len(used)
        return known["apart"]

    # -- shared by layers ------------------------------------------------------------------

    @property
    def _size(self) -> int:
        """Positions of a block"""
        assert self.blocks.layout is not None
        return self.blocks.layout.size

    def _attended(self, q, rows: Rows, keys: PackedCache, values: PackedCache, table: torch.Tensor) -> torch.Tensor:
        return packed_attention(q, keys, values, self._plan(q.shape[1], rows, keys, table), self.scale)

    def _plan(self, heads: int, rows: Rows, keys: PackedCache, table: torch.Tensor) -> Plan:
        key = tuple(rows.counts)
        if key not in self.group.packed:
            self.group.packed[key] = plan(keys, heads, rows.counts, self.group.kv_lens, table)
        return self.group.packed[key]

    def _slots(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Block and offset of each row, [n] each"""
        group = self.group
        place = rows.gather(group.row_places)
        return group.table[rows.gather(group.stream), place // self._size].long(), place % self._size

    def _own(self) -> tuple[PackedCache, torch.Tensor, torch.Tensor, torch.Tensor]:
        """For streams without blocks: a cache for this step, its table, and the slot of each row"""
        known, group = self.group.packed, self.group
        if "own" not in known:
            counts = [-(-n // self._size) for n in group.kv_lens]
            first = torch.tensor([0, *counts]).cumsum(0)
            table = (first[:-1, None] + torch.arange(max(counts))).clamp_max(int(first[-1]) - 1).to(torch.int32)
            memory, layout = self.blocks.layers[self.layer], self.blocks.layout
            assert layout is not None
            cache = PackedCache(memory.new_zeros(int(first[-1]), *memory.shape[1:]), layout)
            place = group.row_places
            block = table[group.stream, place // self._size].long()
            known["own"] = cache, table, block, place % self._size
        return known["own"]

    def _clean(self) -> PackedCache:
        """The layer's cache. Values right after the end of a stream are finite: the kernel multiplies them by 0."""
        cache, known = self.blocks.caches[self.layer], self.group.packed
        assert isinstance(cache, PackedCache)
        if "tails" not in known:
            known["tails"] = self._tails()
        block, offset = known["tails"]
        if len(block) and known.get("clean") != self.layer:
            known["clean"] = self.layer
            bad = ~cache.read_values(block, offset).flatten(1).isfinite().all(1)
            if bad.any():
                block, offset = block[bad], offset[bad]
                nothing = torch.zeros(len(block), cache.kv_heads, cache.dim, dtype=cache.dtype)
                cache.write(nothing, nothing, block, offset)
        return cache

    def _tails(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots after the end of a stream that the kernel reads with the last keys, 16 or 32 at once"""
        run = 32 if self._size % 32 == 0 else 16
        blocks: list[int] = []
        offsets: list[int] = []
        for table, length in zip(self.group.tables, self.group.kv_lens, strict=True):
            if count := -length % run:
                blocks += [int(table[length // self._size])] * count
                offsets += range(length % self._size, length % self._size + count)
        return torch.tensor(blocks, dtype=torch.int64), torch.tensor(offsets, dtype=torch.int64)
