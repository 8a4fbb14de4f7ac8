"""K, V and row features of all layers in the blocks vLLM hands out.

One tensor per layer, [blocks, Hkv, block_size, 2 * D]: keys before values,
post-RoPE, plainly laid out, so that policies may read them back. A block given
to features is the same bytes seen as [rows, width].
"""

from dataclasses import dataclass

import torch


@dataclass
class Slots:
    """Where rows live: block and offset of each, [T] int64."""

    block: torch.Tensor
    offset: torch.Tensor

    def __getitem__(self, rows) -> "Slots":
        return Slots(self.block[rows], self.offset[rows])


class Pages:
    def __init__(self, layers: list[torch.Tensor]):
        self.layers = layers
        self.head_dim = layers[0].shape[-1] // 2

    def write_keys(self, layer: int, slots: Slots, keys_THD: torch.Tensor) -> None:
        self.layers[layer].transpose(1, 2)[slots.block, slots.offset, :, : self.head_dim] = keys_THD

    def write_values(self, layer: int, slots: Slots, values_THD: torch.Tensor) -> None:
        self.layers[layer].transpose(1, 2)[slots.block, slots.offset, :, self.head_dim :] = values_THD

    def read_values(self, layer: int, slots: Slots) -> torch.Tensor:
        """-> [T, Hkv, D]"""
        return self.layers[layer].transpose(1, 2)[slots.block, slots.offset, :, self.head_dim :]

    def read(self, layer: int, slots: Slots) -> torch.Tensor:
        """Keys and values, [T, Hkv, 2 * D]"""
        return self.layers[layer].transpose(1, 2)[slots.block, slots.offset]

    def read_heads(self, layer: int, slots: Slots) -> torch.Tensor:
        """Keys where each head has slots of its own, [Hkv, m] -> [Hkv, m, D]"""
        head = torch.arange(len(slots.block), device=slots.block.device)[:, None]
        return self.layers[layer][slots.block, head, slots.offset, : self.head_dim]

    def _features(self, layer: int, width: int) -> torch.Tensor:
        blocks = self.layers[layer].flatten(1)  # [blocks, elements]
        rows = blocks.shape[1] // width
        return blocks[:, : rows * width].unflatten(1, (rows, width))

    def write_features(self, layer: int, slots: Slots, features_TW: torch.Tensor, width: int, start: int = 0) -> None:
        """Columns [start, start + W) of rows that are `width` wide."""
        end = start + features_TW.shape[1]
        self._features(layer, width)[slots.block, slots.offset, start:end] = features_TW

    def read_features(self, layer: int, slots: Slots, width: int, start: int, end: int) -> torch.Tensor:
        return self._features(layer, width)[slots.block, slots.offset, start:end]
