"""Which cached keys a canvas may see: a selection's choices, and attention over them.

A view belongs to one canvas of one request and lives as long as it does. Its
summaries lie in blocks of the request, in the slots of so many keys; what was
chosen lasts until the prompt is refreshed or the selection wants to choose
anew.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from vllm_dlm.cache.blocks import KVBlocks, Slots
from vllm_dlm.engine.counts import Counts
from vllm_dlm.kernels.delta_attention import delta_attention
from vllm_dlm.kernels.sparse_attention import sparse_attention
from vllm_dlm.plugins.selection.base import Asked, CachedPrompt, Choice, Selection, Summaries


@dataclass
class View:
    selection: Selection
    prompt_len: int
    length: int
    block_size: int
    kv_table: torch.Tensor  # [blocks] ids
    summary_table: torch.Tensor  # [blocks] ids
    frozen: bool  # a choice lasts until the next refresh, whatever the selection says
    steps: int = 0  # served by the present choice
    chosen: dict[int, Choice] = field(default_factory=dict)  # by layer
    previous: dict[int, Choice] = field(default_factory=dict)  # the choice before, of the same keys

    def __post_init__(self):
        unit, device = self.selection.unit, self.kv_table.device
        self.free = self.selection.chosen_from(self.prompt_len) // unit  # units from here on are always visible
        self.summaries = self.selection.summary_rows(self.prompt_len)
        first = torch.arange(-(-self.length // unit), device=device) * unit  # position of each unit's first key
        self.units = (
            self.kv_table[first // self.block_size] * (self.block_size // unit) + first % self.block_size // unit
        )
        self.summary_slots = self._slots(self.summary_table, self.summaries)
        self.lengths = torch.tensor([self.length], device=device)
        self.described = torch.tensor([self.summaries], device=device)
        self.ends = torch.tensor([-(-self.prompt_len // unit)], device=device)

    def _slots(self, table: torch.Tensor, rows: int) -> Slots:
        row = torch.arange(rows, device=table.device)
        return Slots(table[row // self.block_size], row % self.block_size)

    def sees_all(self, layer: int) -> bool:
        return self.selection.sees_all(layer)

    # -- between steps ---------------------------------------------------------------------

    def step_begins(self) -> bool:
        """-> whether this step chooses anew"""
        if self.chosen and not self.frozen and not self.selection.keeps(self.steps):
            self.steps, self.previous, self.chosen = 0, self.chosen, {}
        self.steps += 1
        return not self.chosen

    def refresh(self, layer: int, pages: KVBlocks, keys: torch.Tensor, counts: Counts) -> None:
        """The prompt has new keys in this layer, [prompt_len, Hkv, D]."""
        if self.sees_all(layer):
            return
        dim = keys.shape[2]
        first, second = (
            F.pad(vectors, (0, dim - vectors.shape[2])).to(keys.dtype) for vectors in self.selection.summarise(keys)
        )
        pages.write_keys(layer, self.summary_slots, first)
        pages.write_values(layer, self.summary_slots, second)
        self.chosen.pop(layer, None)
        self.previous.pop(layer, None)
        self.steps = 0
        counts.summaries += self.summaries

    # -- attention -------------------------------------------------------------------------

    def visible_units(
        self, layer: int, pages: KVBlocks, q: torch.Tensor, voters: torch.Tensor, scale: float, counts: Counts
    ) -> torch.Tensor:
        """-> [Hkv, K] units to read, those outside the prompt included"""
        if layer not in self.chosen:
            self.chosen[layer] = self.selection.choose(self.asked(layer, pages, q, voters, scale))
            counts.keys_scored += self.chosen[layer].scored
        units = self.chosen[layer].units[0]
        free = torch.arange(self.free, len(self.units), dtype=units.dtype, device=units.device)
        return torch.cat([units, free.expand(len(units), -1)], 1)

    def unit_mask(self, units: torch.Tensor) -> torch.Tensor:
        """Units to read [Hkv, K] -> which of all units of the canvas those are, [Hkv, units] bool"""
        none = torch.zeros(len(units), len(self.units), dtype=torch.bool, device=units.device)
        return none.scatter_(1, units.long(), True)

    def asked(self, layer: int, pages: KVBlocks, q: torch.Tensor, voters: torch.Tensor, scale: float) -> Asked:
        dim = q.shape[2]
        rows = pages.read_blocks(layer, self.summary_table)[:, : self.summaries].transpose(0, 1)  # [R, Hkv, 2 * D]
        (first, _), (second, _) = self.selection.vectors(dim, rows.dtype)
        summaries = Summaries(rows[..., :first], rows[..., dim : dim + second])
        prompt = CachedPrompt(
            voters, lambda runs, size: self._read(layer, pages, runs, size),
            self.prompt_len, self.length, scale, self.previous.get(layer),
        )  # fmt: skip
        return Asked(q[None], summaries, None, self.described, self.ends, prompt)

    def _read(self, layer: int, pages: KVBlocks, runs: torch.Tensor, size: int) -> torch.Tensor:
        """Runs [Hkv, m] of `size` neighbours -> [Hkv, m, size, 2 * D]"""
        first = runs.long() * size
        return pages.read_runs(layer, Slots(self.kv_table[first // self.block_size], first % self.block_size), size)

    def attend(
        self, layer: int, pages: KVBlocks, q: torch.Tensor, voters, scale: float, counts: Counts
    ) -> torch.Tensor:
        """q [n, H, D] over what is visible -> [n, H, D]"""
        if not len(q):
            return q
        units = self.visible_units(layer, pages, q, voters, scale, counts)
        self._count(units, len(q), counts)
        return sparse_attention(
            q, torch.arange(2, device=q.device) * len(q), pages.layers[layer], self.units[None], units[None],
            self.lengths, self.selection.unit, scale, False,
        )  # fmt: skip

    def delta(
        self,
        layer: int,
        pages: KVBlocks,
        q: torch.Tensor,
        voters,
        changed: torch.Tensor,
        moved: torch.Tensor,
        scale: float,
        counts: Counts,
    ) -> torch.Tensor:
        """What the `moved` values [S, Hkv, D] at `changed` positions [S] add to contexts over what is visible"""
        if not len(q):
            return q
        units = self.visible_units(layer, pages, q, voters, scale, counts)
        self._count(units, len(q), counts)
        unit = self.selection.unit
        dim = q.shape[2]
        keys = self._read(layer, pages, units, unit).flatten(1, 2)[..., :dim]
        if last := self.length % unit:
            keys = keys[:, : keys.shape[1] - unit + last]  # the last unit is visible, and last
        seen = self.unit_mask(units)[:, changed // unit]  # [Hkv, S]: what a head does not see moves nothing for it
        columns = self._read(layer, pages, changed.expand(len(units), -1), 1)[:, :, 0, :dim]
        return delta_attention(q, keys, columns, moved * seen.T[..., None], scale)

    def _count(self, units: torch.Tensor, queries: int, counts: Counts) -> None:
        visible = min(units.shape[1] * self.selection.unit, self.length)
        counts.attended([queries], [visible], read=True, dense=[self.length])
