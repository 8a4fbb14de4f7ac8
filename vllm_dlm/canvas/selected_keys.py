"""Selected keys: state between steps of a stream whose response reads only part of its keys.

`SelectedKeys` belongs to one stream of one request and has its lifetime.
Summaries are in KV blocks of the request. A choice is used until the prompt is
refreshed or the selection chooses again. The host knows only whether a choice
exists. Choices are stored in a pool on the device and read in place.
"""

import weakref
from dataclasses import dataclass

import numpy as np
import torch

from vllm_dlm.plugins.selection.base import Selection


class ChoicePool:
    """Stored choices of all streams with one selection, by layer. Slot 0 is unused. Device memory is freed when the
    last slot is released: clients choose selections, so pools come and go with requests."""

    def __init__(self) -> None:
        self.layers: dict[int, torch.Tensor] = {}  # [slots, Hkv, units + memo] int32
        self._free: list[int] = []
        self._slots, self._units, self._memo = 1, 0, 0  # number of slots, widths

    def slot(self, units: int, memo: int) -> int:
        """A slot for `units` chosen units and `memo` numbers that are kept for the next choice"""
        if self._unused:
            self._free, self._slots, self._units, self._memo = [], 1, 0, 0
        if units > self._units or memo > self._memo:
            # Copy stored choices to wider rows.
            kept, wider, before = self.layers, {}, self._units
            self._units, self._memo = max(units, self._units), max(memo, self._memo)
            for layer, own in kept.items():
                units_of, memo_of = own.split([before, own.shape[2] - before], 2)
                wider[layer] = self._empty(own.shape[1], own.device)
                wider[layer][: len(own), :, :before] = units_of
                wider[layer][: len(own), :, self._units : self._units + memo_of.shape[2]] = memo_of
            self.layers = wider
        if not self._free:
            self._free = list(range(self._slots, 2 * self._slots))[::-1]
            self._slots *= 2
        return self._free.pop()

    def release(self, slot: int) -> None:
        self._free.append(slot)
        if self._unused:
            self.layers = {}

    @property
    def _unused(self) -> bool:
        return len(self._free) == self._slots - 1

    def _empty(self, kv_heads: int, device: torch.device) -> torch.Tensor:
        shape = (self._slots, kv_heads, self._units + self._memo)
        return torch.full(shape, -1, dtype=torch.int32, device=device)

    def tensors(self, layer: int, kv_heads: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """[slots, Hkv, units] and [slots, Hkv, memo], read and written in place"""
        kept = self.layers.get(layer)
        if kept is None or len(kept) < self._slots:
            self.layers[layer] = self._empty(kv_heads, device)
            if kept is not None:
                self.layers[layer][: len(kept)] = kept
            kept = self.layers[layer]
        return kept[..., : self._units], kept[..., self._units :]


@dataclass(eq=False)
class SelectedKeys:
    selection: Selection
    prompt_len: int
    length: int  # rows of the canvas
    block_size: int
    kv_table: np.ndarray  # [blocks] ids
    summary_table: np.ndarray  # [blocks] ids
    frozen: bool  # a choice is used until the next refresh, even if the selection would choose again
    pool: ChoicePool  # shared by streams with this selection
    steps: int = 0  # steps that used the current choice
    held: bool = False  # a choice exists
    known: bool = False  # the pool may still hold an earlier choice from the same keys
    chooses: bool = False  # this step chooses
    described: bool = True  # candidates have summaries, or the step that recomputes all keys creates them

    def __post_init__(self) -> None:
        selection, self.units = self.selection, self.selection.prompt_units(self.prompt_len)
        self.free = self.units.candidates // selection.unit  # first unit that is always visible, as are all later ones
        #: choices are used by later steps, too
        self.remembers = self.frozen or selection.keeps(1) or self.units.memo > 0
        self.slot = self.pool.slot(self.units.kept, self.units.memo) if self.remembers else 0
        if self.slot:
            weakref.finalize(self, self.pool.release, self.slot)

    @property
    def tail(self) -> int:
        """Number of units that are always visible, from `free` on."""
        return -(-self.length // self.selection.unit) - self.free

    @property
    def visible(self) -> int:
        """Number of keys that a query sees."""
        return min((self.units.kept + self.tail) * self.selection.unit, self.length)

    def step_begins(self) -> bool:
        """-> whether this step makes a new choice"""
        if self.held and not self.frozen and not self.selection.keeps(self.steps):
            self.steps, self.known, self.held = 0, True, False
        self.steps += 1
        self.chooses, self.held = not self.held, True
        return self.chooses

    def refreshed(self) -> None:
        """Discards the choice: the prompt has new keys, or the step that should choose had no querying row."""
        self.steps, self.known, self.held = 0, False, False
