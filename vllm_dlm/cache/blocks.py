"""Access to keys, values and row features of all layers in the blocks that vLLM allocates.

One tensor per layer, [blocks, Hkv, block_size, 2 * D]: keys after rotary
embedding, then values. On a CPU keys and values may be in the layout of vLLM's
kernel instead (kernels/packed_attention). Summaries are plain everywhere. A
block that stores features is the same bytes viewed as [rows, width].
"""

import functools
import math
import mmap
from dataclasses import dataclass

import torch

from vllm_dlm.kernels.block_rows import read_keys, read_rows, read_values, write_rows
from vllm_dlm.kernels.packed_attention import Layout, PackedCache
from vllm_dlm.plugins.reuse.flow import Rows


def zeros(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, mapping: int = mmap.MAP_SHARED
) -> torch.Tensor:
    """A cache of zeros: FlashAttention multiplies values after a sequence's end by 0, and a NaN would remain. On CPUs,
    pages become resident on their first write, unlike those of torch.zeros, which writes all of them."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mapping | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


@dataclass
class Slots:
    """Cache slots of live rows: block and offset of each row, [T] int64. Rows with block -1 have no slot."""

    block: torch.Tensor
    offset: torch.Tensor

    def __getitem__(self, rows) -> "Slots":
        return Slots(self.block[rows], self.offset[rows])


class KVBlocks:
    def __init__(self, layers: list[torch.Tensor], layout: Layout | None = None):
        self.layers, self.layout = layers, layout
        #: the layers, as kernels read them
        self.caches = layers if layout is None else [PackedCache(layer, layout) for layer in layers]
        self.head_dim = layers[0].shape[-1] // 2 if layers else 0

    @functools.cached_property
    def moved(self) -> PackedCache:
        """Zeros. During a call, they hold a layer's changes of values in the packed layout. Memory that is only read
        takes no pages."""
        assert self.layout is not None
        like = self.layers[0]
        return PackedCache(zeros(tuple(like.shape), like.dtype, like.device, mmap.MAP_PRIVATE), self.layout)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copies blocks `source` [n] to blocks `target` [n] in every layer"""
        for layer in self.layers:
            layer.index_copy_(0, target, layer.index_select(0, source))

    def clear(self, blocks: torch.Tensor) -> None:
        """Zeros blocks [n] in every layer"""
        for layer in self.layers:
            layer.index_fill_(0, blocks, 0)

    def write_plain(self, layer: int, slots: Slots, first: torch.Tensor, second: torch.Tensor) -> None:
        """first and second [n, Hkv, D] in the places of plain keys and values"""
        places = self.layers[layer].transpose(1, 2)
        places[slots.block, slots.offset, :, : self.head_dim] = first
        places[slots.block, slots.offset, :, self.head_dim :] = second

    def read_keys(self, layer: int, slots: Slots) -> torch.Tensor:
        """-> [n, Hkv, D]"""
        return read_keys(self.caches[layer], slots.block, slots.offset)

    def read_values(self, layer: int, slots: Slots, rows: Rows) -> torch.Tensor:
        """-> [n, Hkv, D]"""
        return read_values(self.caches[layer], slots.block, slots.offset, rows.index)

    def write_features(self, layer: int, slots: Slots, rows: Rows, features: torch.Tensor) -> None:
        """Stores features [n, W]"""
        write_rows(self.layers[layer], slots.block, slots.offset, features, rows.index)

    def read_features(self, layer: int, slots: Slots, rows: Rows, width: int) -> torch.Tensor:
        """-> [n, W]"""
        return read_rows(self.layers[layer], width, slots.block, slots.offset, rows.index)
