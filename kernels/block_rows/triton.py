"""Each program copies a piece of one row."""

import torch
import triton
import triton.language as tl

from vllm_dlm.kernels.triton_utils import live_row, padded

#: elements per program
TILE = 2048


@triton.jit
def _placed(block, offset, index, i):
    """-> block and offset of row i, and whether it has a place"""
    row = live_row(index, i)
    there = row >= 0
    row = tl.maximum(row, 0)
    physical = tl.load(block + row).to(tl.int64)
    return physical, tl.load(offset + row).to(tl.int64), there & (physical >= 0)


@triton.jit(do_not_specialize_on_alignment=["block", "offset", "index"])
def _rows_kernel(
    cache, block, offset, values, index, width, stride_block, stride_row, WRITES: tl.constexpr, TILE: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64)
    physical, row, there = _placed(block, offset, index, i)
    piece = tl.program_id(1) * TILE + tl.arange(0, TILE)
    kept = cache + physical * stride_block + row * width + piece
    given = values + i * stride_row + piece
    mask = piece < tl.where(there, width, 0)
    if WRITES:
        tl.store(kept, tl.load(given, mask=mask, other=0.0).to(cache.dtype.element_ty), mask=mask)
    else:
        tl.store(given, tl.load(kept, mask=mask, other=0.0), mask=piece < width)


@triton.jit(do_not_specialize_on_alignment=["block", "offset", "index"])
def _values_kernel(
    cache,
    block,
    offset,
    out,
    index,
    heads,
    stride_block,
    stride_head,
    stride_slot,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    physical, slot, there = _placed(block, offset, index, i)
    head, channel = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, DIM_PAD)
    kept = (head < tl.where(there, heads, 0))[:, None] & (channel < DIM)[None, :]
    cache += physical * stride_block + slot * stride_slot + DIM
    values = tl.load(cache + head[:, None] * stride_head + channel[None, :], mask=kept, other=0.0)
    mask = (head < heads)[:, None] & (channel < DIM)[None, :]
    tl.store(out + (i * heads + head)[:, None] * DIM + channel[None, :], values, mask=mask)


def read_rows(cache, width, block, offset, index):
    """See dispatch.py"""
    count = len(block if index is None else index)
    out = torch.empty(count, width, dtype=cache.dtype, device=cache.device)
    _copy_rows(cache, block, offset, out, index, False)
    return out


def write_rows(cache, block, offset, values, index):
    """See dispatch.py"""
    _copy_rows(cache, block, offset, values, index, True)


def _copy_rows(cache, block, offset, values, index, writes):
    count, width = values.shape
    # the kernel addresses rows of a block as contiguous bytes
    block_size, both = cache.shape[2:]
    if cache.stride()[1:] != (block_size * both, both, 1):
        raise ValueError(f"each block of the cache must be contiguous, but its strides are {cache.stride()[1:]}")
    tile = min(padded(width, 128), TILE)
    if count:
        inputs, strides = (cache, block, offset, values, index), (cache.stride(0), values.stride(0))
        _rows_kernel[count, triton.cdiv(width, tile)](*inputs, width, *strides, WRITES=writes, TILE=tile, num_warps=4)


def read_values(cache, block, offset, index):
    """See dispatch.py"""
    count, (_, kv_heads, _, both) = len(block if index is None else index), cache.shape
    dim = both // 2
    out = torch.empty(count, kv_heads, dim, dtype=cache.dtype, device=cache.device)
    heads = min(padded(kv_heads), max(TILE // padded(dim), 1))
    if count:
        inputs, sizes = (cache, block, offset, out, index), (kv_heads, *cache.stride()[:3])
        shape = {"HEADS": heads, "DIM": dim, "DIM_PAD": padded(dim)}
        _values_kernel[count, triton.cdiv(kv_heads, heads)](*inputs, *sizes, **shape, num_warps=4)
    return out
