"""The k-th highest score is found bit by bit, then the pages above it and the lowest that tie are written in order.

One program per row of scores. As integers of the same order, scores can be
searched exactly: each of 32 steps counts the pages that reach a candidate.
"""

import torch
import triton
import triton.language as tl

from vllm_dlm.kernels.triton_utils import padded

#: a tile of this many pages stays in registers, longer rows are read again in every step
TILE = 4096
#: the integer of -inf, see _keys
NO_SCORE = tl.constexpr(-0x7F800001)


@triton.jit
def _keys(scores, start, width, TILE: tl.constexpr):
    """Scores start … start + TILE - 1 as int32 in the order of the scores; NO_SCORE beyond the row"""
    page = start + tl.arange(0, TILE)
    score = tl.load(scores + page, mask=page < width, other=float("-inf"))
    score = tl.where(score == 0.0, 0.0, score)  # -0 ties with 0
    bits = score.to(tl.int32, bitcast=True)
    # of negative numbers the larger magnitude is the smaller number
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _count(scores, resident, least, width, TILE: tl.constexpr, ONE_TILE: tl.constexpr):
    """How many keys of the row reach `least`"""
    if ONE_TILE:
        return tl.sum((resident >= least).to(tl.int32), 0)
    number = 0
    for start in range(0, width, TILE):
        number += tl.sum((_keys(scores, start, width, TILE) >= least).to(tl.int32), 0)
    return number


@triton.jit
def _top_kernel(
    scores, kept, names, chosen, width, k, heads, TILE: tl.constexpr, ONE_TILE: tl.constexpr, SLOTS: tl.constexpr
):
    """scores [rows, width] -> chosen [rows, k]"""
    row = tl.program_id(0).to(tl.int64)
    scores += row * width
    chosen += row * k
    most = k
    if kept is not None:
        most = tl.minimum(tl.load(kept + row // heads).to(tl.int32), k)
    resident = _keys(scores, 0, width, TILE)
    # the largest integer that so many keys reach: from the sign down, a bit is set if they still reach it
    level = tl.full([], -0x80000000, tl.int32)
    for step in range(32):
        candidate = level ^ (tl.full([], 1, tl.int32) << (31 - step))
        level = tl.where(_count(scores, resident, candidate, width, TILE, ONE_TILE) >= most, candidate, level)
    level = tl.maximum(level, NO_SCORE + 1)  # with fewer scores than that, all of them
    room = most - _count(scores, resident, level + 1, width, TILE, ONE_TILE)
    above_before, ties_before = 0, 0
    for start in range(0, width, TILE):
        keys = resident if ONE_TILE else _keys(scores, start, width, TILE)
        above, ties = (keys > level).to(tl.int32), (keys == level).to(tl.int32)
        # pages up to and including this one that are above, and that tie
        above_here, ties_here = above_before + tl.cumsum(above, 0), ties_before + tl.cumsum(ties, 0)
        taken = (above > 0) | ((ties > 0) & (ties_here <= room))
        place = above_here + tl.minimum(ties_here, room) - 1
        page = start + tl.arange(0, TILE)
        if names is not None:
            page = tl.load(names + row * width + page, mask=taken, other=0).to(tl.int32)
        tl.store(chosen + place, page, mask=taken)
        above_before += tl.sum(above, 0)
        ties_before += tl.sum(ties, 0)
    number = above_before + tl.minimum(ties_before, room)
    for first in range(0, k, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        tl.store(chosen + slot, -1, mask=(slot >= number) & (slot < k))


def top_pages(scores, k, kept, names):
    """See dispatch.py"""
    *shape, width = scores.shape
    chosen = torch.empty(*shape, k, dtype=torch.int32, device=scores.device)
    tile = min(padded(width, 128), TILE)
    if chosen.numel():
        _top_kernel[(chosen.numel() // k,)](
            scores.contiguous(), kept, names, chosen, width, k, shape[1],
            TILE=tile, ONE_TILE=width <= tile, SLOTS=min(padded(k, 128), TILE), num_warps=4 if tile < TILE else 8,
        )  # fmt: skip
    return chosen


@triton.jit
def _overlap_kernel(
    pages, before, found, number, most, stride_b, stride_h, stride_before_b, stride_before_h, K: tl.constexpr,
    STEPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """found [2, B, Hkv]: pages of a head that were there before, and all of them; each is looked for by halving."""
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    pages += b * stride_b + h * stride_h
    before += b * stride_before_b + h * stride_before_h
    common, total = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for start in range(0, K, TILE):
        place = start + tl.arange(0, TILE)
        page = tl.load(pages + place, mask=place < K, other=-1)
        low, high = tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.int32) + most
        for _ in range(STEPS):  # the first place whose page is not below
            middle = (low + high) // 2
            known = tl.load(before + middle, mask=middle < high, other=-1)
            below = (middle < high) & (known >= 0) & (known < page)
            low, high = tl.where(below, middle + 1, low), tl.where(below, high, tl.minimum(middle, high))
        same = (page >= 0) & (tl.load(before + low, mask=low < most, other=-1) == page)
        common += tl.sum(same.to(tl.int32), 0)
        total += tl.sum((page >= 0).to(tl.int32), 0)
    place = b * tl.num_programs(1) + h
    tl.store(found + place, common)
    tl.store(found + number + place, total)


@triton.jit
def _unless_kernel(
    pages, before, found, same, left, memo, number, share, stride_b, stride_h, stride_before_b, stride_before_h,
    K: tl.constexpr, TILE: tl.constexpr, HEADS_PAD: tl.constexpr,
):  # fmt: skip
    """same [B], left and memo [B, Hkv, K]"""
    b, h, heads = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    head = tl.arange(0, HEADS_PAD)
    common = tl.sum(tl.load(found + b * heads + head, mask=head < heads, other=0), 0)
    total = tl.sum(tl.load(found + number + b * heads + head, mask=head < heads, other=0), 0)
    alike = (common.to(tl.float32) / total.to(tl.float32) >= share).to(tl.int8)
    if h == 0:
        tl.store(same + b, alike)
    row = (b * heads + h) * K
    for start in range(0, K, TILE):
        place = start + tl.arange(0, TILE)
        page = tl.load(pages + b * stride_b + h * stride_h + place, mask=place < K, other=-1)
        old = tl.load(before + b * stride_before_b + h * stride_before_h + place, mask=place < K, other=-1)
        tl.store(left + row + place, tl.where(alike > 0, -1, page), mask=place < K)
        tl.store(memo + row + place, tl.where(alike > 0, old, page), mask=place < K)


def unless_alike(pages, before, share):
    """See dispatch.py"""
    (batch, kv_heads, k), most, device = pages.shape, before.shape[2], pages.device
    found = torch.empty(2, batch, kv_heads, dtype=torch.int32, device=device)
    same = torch.empty(batch, dtype=torch.bool, device=device)
    left, memo = (torch.empty(pages.shape, dtype=torch.int32, device=device) for _ in range(2))
    strides, tile = (*pages.stride()[:2], *before.stride()[:2]), min(padded(k, 128), 1024)
    _overlap_kernel[batch, kv_heads](
        pages, before, found, batch * kv_heads, most, *strides, K=k, STEPS=most.bit_length() + 1, TILE=tile
    )
    _unless_kernel[batch, kv_heads](
        pages, before, found, same.view(torch.int8), left, memo, batch * kv_heads, float(share), *strides,
        K=k, TILE=tile, HEADS_PAD=padded(kv_heads),
    )  # fmt: skip
    return same, left, memo
