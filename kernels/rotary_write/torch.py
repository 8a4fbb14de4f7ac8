"""Rotation by table lookup, shared by queries and keys, then an indexed write to the cache."""

import torch

from vllm_dlm.kernels.packed_attention.cache import PackedCache


def rotary_write(q, k, v, table, positions, block, offset, cache, index):
    """See dispatch.py"""
    if index is not None:
        rows = index.clamp_min(0)
        positions = positions[rows]
        if cache is not None:
            block, offset = block[rows].masked_fill(index < 0, -1), offset[rows]
    if q is not None or k is not None:
        cos, sin = table.index_select(0, positions)[:, None].chunk(2, -1)  # [n, 1, D / 2]
        q, k = (None if x is None else rotate(x, cos, sin) for x in (q, k))
    if cache is not None:
        write(k, v, block, offset, cache)
    return q, k


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the halves of x [T, H, D] by cosines and sines [T, 1, D / 2], in the precision of the table."""
    first, second = x.to(cos.dtype).chunk(2, -1)
    out = torch.empty(x.shape, dtype=cos.dtype, device=x.device)  # instead of `cat`, which copies both halves again
    left, right = out.chunk(2, -1)
    torch.mul(first, cos, out=left).sub_(second * sin)
    torch.mul(second, cos, out=right).add_(first * sin)
    return out.to(x.dtype)


def write(k, v, block, offset, cache):
    if isinstance(cache, PackedCache):
        return cache.write(k, v, block, offset)
    there = block >= 0
    if not there.all():
        block, offset = block[there], offset[there]
        k, v = (None if x is None else x[there] for x in (k, v))
    slots, dim = cache.transpose(1, 2), cache.shape[3] // 2  # [blocks, block_size, Hkv, 2 * D]
    if k is not None:
        slots[block, offset, :, :dim] = k
    if v is not None:
        slots[block, offset, :, dim:] = v
