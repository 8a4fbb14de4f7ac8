"""A radix search finds the k-th highest score two bits at a time. Pages above it and the lowest pages that tie are then
written in order.

One program per row of scores. Scores are mapped to integers of the same order,
so the search is exact. Each of its 16 steps counts the pages that reach three
candidates. The counts are packed into one number, because every sum
synchronizes the threads.
"""

import torch
import triton
import triton.language as tl

from vllm_dlm.kernels.triton_utils import padded

#: pages per tile; a row that fits one tile stays in registers, a longer one is read again in every step
TILE = 4096
#: key of the score -inf, see _keys
NO_SCORE = tl.constexpr(-0x7F800001)


@triton.jit
def _keys(scores, start, width, TILE: tl.constexpr):
    """Scores start … start + TILE - 1 as int32 keys of the same order; NO_SCORE beyond the row"""
    page = start + tl.arange(0, TILE)
    score = tl.load(scores + page, mask=page < width, other=float("-inf"))
    score = tl.where(score == 0.0, 0.0, score)  # -0 ties with 0
    bits = score.to(tl.int32, bitcast=True)
    # negative floats order by descending magnitude, so flip their lower bits
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _count(scores, resident, least, width, TILE: tl.constexpr, ONE_TILE: tl.constexpr):
    """Number of keys of the row that are at least `least`"""
    if ONE_TILE:
        return tl.sum((resident >= least).to(tl.int32), 0)
    number = 0
    for start in range(0, width, TILE):
        number += tl.sum((_keys(scores, start, width, TILE) >= least).to(tl.int32), 0)
    return number


@triton.jit
def _three_counts(keys, first, second, third):
    """Number of keys that reach each of three bounds, packed into one integer with 20 bits per count"""
    reached = (keys >= first).to(tl.int64) + ((keys >= second).to(tl.int64) << 20)
    return tl.sum(reached + ((keys >= third).to(tl.int64) << 40), 0)


@triton.jit(do_not_specialize=["k", "room_for"], do_not_specialize_on_alignment=["kept", "rows"])
def _top_kernel(
    scores,
    kept,
    names,
    chosen,
    rows,
    width,
    k,
    room_for,
    heads,
    stride_row,
    stride_head,
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """scores [B * heads, width] -> chosen [B, or the rows that `rows` selects, heads, room_for >= k]"""
    row = tl.program_id(0).to(tl.int64)
    scores += row * width
    own = row // heads
    if rows is not None:
        own = tl.load(rows + own)
    chosen += own * stride_row + row % heads * stride_head
    most = k
    if kept is not None:
        most = tl.minimum(tl.load(kept + row // heads).to(tl.int32), k)
    resident = _keys(scores, 0, width, TILE)
    # The threshold is the largest integer that at least `most` keys reach. Build it from the sign bit down.
    level = tl.full([], -0x80000000, tl.int32)
    for step in range(16):
        bit = tl.full([], 1, tl.int32) << (30 - 2 * step)
        first, second = level ^ bit, level ^ (bit << 1)
        third = second ^ bit
        if ONE_TILE:
            counts = _three_counts(resident, first, second, third)
        else:
            counts = tl.zeros([], tl.int64)
            for start in range(0, width, TILE):
                counts += _three_counts(_keys(scores, start, width, TILE), first, second, third)
        level = tl.where((counts & 0xFFFFF) >= most, first, level)
        level = tl.where(((counts >> 20) & 0xFFFFF) >= most, second, level)
        level = tl.where((counts >> 40) >= most, third, level)
    level = tl.maximum(level, NO_SCORE + 1)  # with fewer scores than `most`, take all
    room = most - _count(scores, resident, level + 1, width, TILE, ONE_TILE)
    above_before, ties_before = 0, 0
    for start in range(0, width, TILE):
        keys = resident if ONE_TILE else _keys(scores, start, width, TILE)
        above, ties = (keys > level).to(tl.int32), (keys == level).to(tl.int32)
        # inclusive counts of pages above and of ties up to each page
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
    end = room_for
    if rows is not None:
        end = tl.where(number > 0, room_for, 0)  # no page had a score: keep the row
    for first in range(0, end, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        tl.store(chosen + slot, -1, mask=(slot >= number) & (slot < end))


def top_pages(scores, k, kept, names):
    """See dispatch.py"""
    chosen = torch.empty(*scores.shape[:2], k, dtype=torch.int32, device=scores.device)
    store_top_pages(chosen, None, scores, k, kept, names)
    return chosen


def store_top_pages(out, rows, scores, k, kept, names):
    """See dispatch.py"""
    batch, heads, width = scores.shape
    room_for, tile = out.shape[2], min(padded(width, 128), TILE)
    if batch and room_for:
        inputs, sizes = (scores.contiguous(), kept, names, out, rows), (width, k, room_for, heads, *out.stride()[:2])
        shape = {"TILE": tile, "ONE_TILE": width <= tile, "SLOTS": min(padded(room_for, 128), TILE)}
        # a single warp needs no synchronization, which is faster while its registers hold the row
        _top_kernel[batch * heads,](*inputs, *sizes, **shape, num_warps=1 if tile <= 512 else 4 if tile < TILE else 8)


@triton.jit(do_not_specialize=["number", "most"], do_not_specialize_on_alignment=["rows", "known"])
def _overlap_kernel(
    pages,
    before,
    rows,
    known,
    found,
    number,
    most,
    stride_b,
    stride_h,
    stride_before_b,
    stride_before_h,
    K: tl.constexpr,
    STEPS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Stores found [2, B, Hkv]: number of pages of a head that are in `before`, and number of pages. Pages are found by
    binary search."""
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    pages += b * stride_b + h * stride_h
    before += tl.load(rows + b) * stride_before_b + h * stride_before_h
    most = tl.where(tl.load(known + b) != 0, most, 0)
    common, total = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for start in range(0, K, TILE):
        place = start + tl.arange(0, TILE)
        page = tl.load(pages + place, mask=place < K, other=-1)
        low, high = tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.int32) + most
        for _ in range(STEPS):  # binary search for the first entry that is not below the page
            middle = (low + high) // 2
            old = tl.load(before + middle, mask=middle < high, other=-1)
            below = (middle < high) & (old >= 0) & (old < page)
            low, high = tl.where(below, middle + 1, low), tl.where(below, high, tl.minimum(middle, high))
        same = (page >= 0) & (tl.load(before + low, mask=low < most, other=-1) == page)
        common += tl.sum(same.to(tl.int32), 0)
        total += tl.sum((page >= 0).to(tl.int32), 0)
    place = b * tl.num_programs(1) + h
    tl.store(found + place, common)
    tl.store(found + number + place, total)


@triton.jit(do_not_specialize=["number", "most"], do_not_specialize_on_alignment=["rows", "known"])
def _unless_kernel(
    pages, before, rows, known, found, left, number, most, share, stride_b, stride_h, stride_before_b, stride_before_h,
    K: tl.constexpr, TILE: tl.constexpr, HEADS_PAD: tl.constexpr,
):  # fmt: skip
    """Stores left [B, Hkv, K] and copies changed choices to `before`"""
    b, h, heads = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    head = tl.arange(0, HEADS_PAD)
    common = tl.sum(tl.load(found + b * heads + head, mask=head < heads, other=0), 0)
    total = tl.sum(tl.load(found + number + b * heads + head, mask=head < heads, other=0), 0)
    alike = (common.to(tl.float32) / total.to(tl.float32) >= share).to(tl.int32)
    alike = tl.where(tl.load(known + b) != 0, alike, 0)
    changes = tl.where(alike > 0, 0, most)
    row = (b * heads + h) * K
    before += tl.load(rows + b) * stride_before_b + h * stride_before_h
    for start in range(0, most, TILE):
        place = start + tl.arange(0, TILE)
        page = tl.load(pages + b * stride_b + h * stride_h + place, mask=place < K, other=-1)
        tl.store(left + row + place, tl.where(alike > 0, -1, page), mask=place < K)
        tl.store(before + place, page, mask=place < changes)


def unless_alike(pages, before, rows, known, share):
    """See dispatch.py"""
    (batch, kv_heads, k), most = pages.shape, before.shape[2]
    found = torch.empty(2, batch, kv_heads, dtype=torch.int32, device=pages.device)
    left = torch.empty(pages.shape, dtype=torch.int32, device=pages.device)
    strides, tile = (*pages.stride()[:2], *before.stride()[:2]), min(padded(k, 128), 1024)
    grid, sizes = (batch, kv_heads), (batch * kv_heads, most)
    inputs = pages, before, rows, known.view(torch.int8), found
    _overlap_kernel[grid](*inputs, *sizes, *strides, K=k, STEPS=most.bit_length() + 1, TILE=tile)
    heads = padded(kv_heads)
    _unless_kernel[grid](*inputs, left, *sizes, float(share), *strides, K=k, TILE=tile, HEADS_PAD=heads)
    return left
