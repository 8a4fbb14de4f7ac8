"""Random rows of a denoising step: some are padding, some have no place in the cache; indices have 32 or 64 bits."""

from dataclasses import dataclass

import torch


@dataclass
class LiveRows:
    """T live rows, and a cache in which unused memory is NaN"""

    cache: torch.Tensor  # [blocks, Hkv, block_size, 2 * D]
    positions: torch.Tensor  # [T]
    block: torch.Tensor  # [T]
    offset: torch.Tensor  # [T]
    index: torch.Tensor  # [n], each row at most once

    @classmethod
    def random(cls, kv_heads=2, dim=64, dtype=torch.float32, block_size=16, names=torch.int64, seed=0):
        g = torch.Generator().manual_seed(seed)
        live, blocks = 11, 4
        place = torch.randperm(blocks * block_size, generator=g)[:live]
        block = torch.where(torch.arange(live) % 4 == 2, -1, place // block_size)
        index = torch.tensor([3, 0, -1, 10, 2, 7, -1])
        cache = torch.randn(blocks, kv_heads, block_size, 2 * dim, generator=g).to(dtype)
        positions = torch.randint(0, 50, (live,), generator=g)
        return cls(cache, *(x.to(names) for x in (positions, block, place % block_size, index)))


def heads(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
