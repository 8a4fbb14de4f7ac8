"""A KV cache in the layout of an instruction set, and the place of each number of a key or value in it.

A block of one head is 2 * size * D numbers, the half of the keys before the half of the values. Within a half the
order depends on the instruction set. Two orders are read without an index per number: keys as [D, size] and values as
[size, D], the layout for general vector instructions.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Layout:
    isa: str  # vLLM's name of the instruction set
    keys: torch.Tensor  # [size, D] int64: place of each number within its half
    values: torch.Tensor  # [size, D] int64
    columns: bool  # keys are [D, size]
    rows: bool  # values are [size, D]

    @classmethod
    def of(cls, isa: str, keys: torch.Tensor, values: torch.Tensor) -> "Layout":
        plain = torch.arange(keys.numel())
        return cls(isa, keys, values, torch.equal(keys.t().flatten(), plain), torch.equal(values.flatten(), plain))

    @property
    def size(self) -> int:
        """Positions of a block"""
        return self.keys.shape[0]


def read_runs(cache: "torch.Tensor | PackedCache", row: torch.Tensor, length: int) -> torch.Tensor:
    """Keys and values [n, length, 2 * D] of runs of consecutive positions; `length` divides the block. `row` [n] counts
    runs through the blocks, the heads of a block and the runs of a head. `cache`: packed, or plain
    [blocks, Hkv, size, 2 * D]"""
    if isinstance(cache, PackedCache):
        return torch.cat([cache.key_runs(row, length), cache.value_runs(row, length)], -1)
    width = cache.shape[3]
    return cache.view(-1, length * width).index_select(0, row).view(-1, length, width)


def read_key_runs(cache: "torch.Tensor | PackedCache", row: torch.Tensor, length: int) -> torch.Tensor:
    """-> [n, length, D], any strides"""
    if isinstance(cache, PackedCache):
        return cache.key_runs(row, length)
    return read_runs(cache, row, length)[..., : cache.shape[3] // 2]


class PackedCache:
    """The keys and values of one layer. `block` and `offset` [n] are the slots of n positions; block -1: no slot"""

    is_cuda = False

    def __init__(self, memory: torch.Tensor, layout: Layout):
        self.memory = memory  # [blocks, Hkv, size, 2 * D], contiguous; the order of its numbers is the layout's
        self.layout, self.shape, self.dtype, self.device = layout, memory.shape, memory.dtype, memory.device
        self.blocks, self.kv_heads, self.size, width = memory.shape
        self.dim = width // 2
        self._halves = memory.view(self.blocks * self.kv_heads * 2, -1)  # [blocks * Hkv * 2, size * D]

    def halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in the kernels' shapes, [blocks, Hkv, size, D] each"""
        both = self.memory.view(self.blocks, self.kv_heads, 2 * self.size, self.dim)
        return both[:, :, : self.size], both[:, :, self.size :]

    # -- positions -------------------------------------------------------------------------

    def read_keys(self, block: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """-> [n, Hkv, D]"""
        half = 2 * self._heads(block)  # [n, Hkv]
        if self.layout.columns:
            return self._halves.view(-1, self.dim, self.size)[half, :, offset[:, None]]
        return self._halves[half[..., None], self.layout.keys[offset][:, None]]

    def read_values(self, block: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """-> [n, Hkv, D]"""
        half = 2 * self._heads(block) + 1
        if self.layout.rows:
            place = (half * self.size + offset[:, None]).flatten()
            return self._halves.view(-1, self.dim).index_select(0, place).view(-1, self.kv_heads, self.dim)
        return self._halves[half[..., None], self.layout.values[offset][:, None]]

    def write(self, k: torch.Tensor | None, v: torch.Tensor | None, block: torch.Tensor, offset: torch.Tensor) -> None:
        """k and v [n, Hkv, D]; None: not changed"""
        from vllm_dlm.kernels.packed_attention.vllm import write

        if not len(block):
            return
        if k is None:
            k = self.read_keys(block.clamp_min(0), offset)
        if v is None:
            v = self.read_values(block.clamp_min(0), offset)
        write(k, v, *self.halves(), block * self.size + offset, self.layout.isa)

    def _heads(self, block: torch.Tensor) -> torch.Tensor:
        """[n] -> [n, Hkv]"""
        return block[:, None] * self.kv_heads + torch.arange(self.kv_heads)

    # -- runs of positions, see read_runs --------------------------------------------------

    def key_runs(self, row: torch.Tensor, length: int) -> torch.Tensor:
        """-> [n, length, D], any strides"""
        head, run = self._run(row, length)
        if self.layout.columns:
            return self._halves.view(-1, self.dim, self.size // length, length)[2 * head, :, run].mT
        return self._numbers(2 * head, run, self.layout.keys, length)

    def value_runs(self, row: torch.Tensor, length: int) -> torch.Tensor:
        """-> [n, length, D]"""
        head, run = self._run(row, length)
        if self.layout.rows:
            per = self.size // length
            found = self._halves.view(-1, length * self.dim).index_select(0, (2 * head + 1) * per + run)
            return found.view(-1, length, self.dim)
        return self._numbers(2 * head + 1, run, self.layout.values, length)

    def _run(self, row: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """-> block and head, and run within the block"""
        per = self.size // length
        return (row, torch.zeros_like(row)) if per == 1 else (row // per, row % per)

    def _numbers(self, half: torch.Tensor, run: torch.Tensor, order: torch.Tensor, length: int) -> torch.Tensor:
        place = order.view(-1, length * self.dim)[run]  # [n, length * D]
        return self._halves[half[:, None], place].view(-1, length, self.dim)
