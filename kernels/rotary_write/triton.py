"""Each program processes some heads of one row of the queries, the keys or the values."""

import torch
import triton
import triton.language as tl

from vllm_dlm.kernels.triton_utils import live_row, padded

#: channels per program, counting one half of each head
CHANNELS = 1024


@triton.jit
def _load_halves(x, head, heads, stride_head, HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    """-> both halves of each head's channels, [HEADS, HALF_PAD] each"""
    channel = tl.arange(0, HALF_PAD)
    place = x + head[:, None] * stride_head + channel[None, :]
    mask = (head < heads)[:, None] & (channel < HALF)[None, :]
    return tl.load(place, mask=mask, other=0.0), tl.load(place + HALF, mask=mask, other=0.0)


@triton.jit
def _store_halves(x, first, second, head, heads, stride_head, HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    channel = tl.arange(0, HALF_PAD)
    place = x + head[:, None] * stride_head + channel[None, :]
    mask = (head < heads)[:, None] & (channel < HALF)[None, :]
    tl.store(place, first.to(x.dtype.element_ty), mask=mask)
    tl.store(place + HALF, second.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _product(x, factor, exact: tl.constexpr):
    """Product in float32, rounded to dtype `exact`"""
    return (x * factor).to(exact).to(tl.float32)


@triton.jit
def _rotated(x, head, heads, stride_head, table, position, HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    """-> rotated halves of some heads of a row, [HEADS, HALF_PAD] each"""
    exact: tl.constexpr = table.dtype.element_ty
    a, b = _load_halves(x, head, heads, stride_head, HALF, HALF_PAD)
    a, b = a.to(exact).to(tl.float32), b.to(exact).to(tl.float32)
    channel = tl.arange(0, HALF_PAD)
    angle = table + position * (2 * HALF) + channel
    cos = tl.load(angle, mask=channel < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(angle + HALF, mask=channel < HALF, other=0.0).to(tl.float32)[None, :]
    first = (_product(a, cos, exact) - _product(b, sin, exact)).to(exact)
    second = (_product(b, cos, exact) + _product(a, sin, exact)).to(exact)
    return first.to(x.dtype.element_ty), second.to(x.dtype.element_ty)


@triton.jit(do_not_specialize_on_alignment=["positions", "block", "offset", "index"])
def _rotary_kernel(
    q, k, v, q_out, k_out, table, positions, block, offset, cache, index, q_heads, kv_heads, q_parts, kv_parts,
    stride_q, stride_q_head, stride_k, stride_k_head, stride_v, stride_v_head, stride_block, stride_head, stride_slot,
    HEADS: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
):  # fmt: skip
    """Program (i, part) processes one part of row i's heads: parts of q come first, then those of k, then those of v"""
    i, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = live_row(index, i)
    there = row >= 0
    row = tl.maximum(row, 0)
    position = tl.load(positions + row).to(tl.int64)
    if q is not None:
        if part < q_parts:
            head = part * HEADS + tl.arange(0, HEADS)
            a, b = _rotated(q + i * stride_q, head, q_heads, stride_q_head, table, position, HALF, HALF_PAD)
            _store_halves(q_out + i * q_heads * (2 * HALF), a, b, head, q_heads, 2 * HALF, HALF, HALF_PAD)
            return
        part -= q_parts
    head = part * HEADS + tl.arange(0, HEADS)
    if cache is not None:
        physical = tl.load(block + row).to(tl.int64)
        there = there & (physical >= 0)
        cache += physical * stride_block + tl.load(offset + row).to(tl.int64) * stride_slot
    if k is not None:
        if part < kv_parts:
            a, b = _rotated(k + i * stride_k, head, kv_heads, stride_k_head, table, position, HALF, HALF_PAD)
            _store_halves(k_out + i * kv_heads * (2 * HALF), a, b, head, kv_heads, 2 * HALF, HALF, HALF_PAD)
            if cache is not None:
                _store_halves(cache, a, b, head, tl.where(there, kv_heads, 0), stride_head, HALF, HALF_PAD)
            return
        head -= kv_parts * HEADS
    if v is not None and cache is not None:
        kv_heads = tl.where(there, kv_heads, 0)
        a, b = _load_halves(v + i * stride_v, head, kv_heads, stride_v_head, HALF, HALF_PAD)
        _store_halves(cache + 2 * HALF, a, b, head, kv_heads, stride_head, HALF, HALF_PAD)


def rotary_write(q, k, v, table, positions, block, offset, cache, index):
    """See dispatch.py"""
    outs = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
    q_heads = 0 if q is None else q.shape[1]
    kv_heads = next((x.shape[1] for x in (k, v) if x is not None), 0)
    rows = next((len(x) for x in (q, k, v) if x is not None), 0)
    half = table.shape[1] // 2
    heads = min(padded(max(q_heads, kv_heads)), max(CHANNELS // padded(half), 1))
    q_parts, kv_parts = triton.cdiv(q_heads, heads), triton.cdiv(kv_heads, heads)
    parts = q_parts + kv_parts * ((k is not None) + (v is not None and cache is not None))
    if rows and parts:
        strides = [stride for x in (q, k, v) for stride in ((0, 0) if x is None else x.stride()[:2])]
        _rotary_kernel[rows, parts](
            q, k, v, *outs, table, positions, block, offset, cache, index, q_heads, kv_heads, q_parts, kv_parts,
            *strides, *((0, 0, 0) if cache is None else cache.stride()[:3]),
            HEADS=heads, HALF=half, HALF_PAD=padded(half), num_warps=4,
            enable_fp_fusion=False,  # like torch, round products before adding them
        )  # fmt: skip
    return [out for out in outs if out is not None]
