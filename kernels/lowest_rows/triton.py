"""A radix search finds the highest selected score two bits at a time. Rows below it and the first rows that tie are
then written in order.

One program per canvas. Scores are mapped to integers of the same order, so the
search is exact. Each of its 16 steps counts the rows below three candidates in
one sum.
"""

import torch
import triton
import triton.language as tl

from vllm_dlm.kernels.triton_utils import padded

#: rows per tile; a canvas that fits one tile stays in registers, a longer one is read again in every step
TILE = 2048
#: entries without a row that are filled with -1 at once
SLOTS = 1024
#: keys of forced rows, of NaN scores, and of rows beyond the end
FORCED, NO_NUMBER, NO_ROW = tl.constexpr(-0x80000000), tl.constexpr(0x7FFFFFFE), tl.constexpr(0x7FFFFFFF)
#: bits per count, three of which share a 64-bit integer, and the largest count; no canvas has more rows
COUNT, MOST = tl.constexpr(21), tl.constexpr((1 << 21) - 1)


@triton.jit
def _keys(score, forced, start, end, TILE: tl.constexpr):
    """int32 keys of rows start … start + TILE - 1; lower keys are selected first"""
    row = start + tl.arange(0, TILE)
    value = tl.load(score + row, mask=row < end, other=0.0)
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)  # -0 ties with 0
    # negative floats order by descending magnitude, so flip their lower bits
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(value != value, NO_NUMBER, key)
    key = tl.where(tl.load(forced + row, mask=row < end, other=0) != 0, FORCED, key)
    return tl.where(row < end, key, NO_ROW)


@triton.jit
def _below(keys, low, mid, high):
    """Number of keys below each of three bounds, packed into one integer"""
    counts = (keys < low).to(tl.int64) + ((keys < mid).to(tl.int64) << COUNT)
    return tl.sum(counts + ((keys < high).to(tl.int64) << (2 * COUNT)), 0)


@triton.jit
def _count_below(score, forced, resident, start, end, low, mid, high, TILE: tl.constexpr, ONE_TILE: tl.constexpr):
    if ONE_TILE:
        return _below(resident, low, mid, high)
    number = tl.full([], 0, tl.int64)
    for first in range(start, end, TILE):
        number += _below(_keys(score, forced, first, end, TILE), low, mid, high)
    return number


@triton.jit(do_not_specialize=["canvases", "total"], do_not_specialize_on_alignment=["forced", "starts", "places"])
def _lowest_kernel(
    score,
    forced,
    starts,
    places,
    out,
    canvases,
    total,
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    SLOTS: tl.constexpr,
):
    c = tl.program_id(0)
    if c == canvases:  # entries after the last canvas
        for first in range(tl.load(places + canvases).to(tl.int32), total, SLOTS):
            slot = first + tl.arange(0, SLOTS)
            tl.store(out + slot, -1, mask=slot < total)
        return
    start, end = tl.load(starts + c).to(tl.int32), tl.load(starts + c + 1).to(tl.int32)
    place, following = tl.load(places + c).to(tl.int32), tl.load(places + c + 1).to(tl.int32)
    k = tl.minimum(following - place, end - start)
    out += place
    resident = _keys(score, forced, start, end, TILE)
    # The k-th lowest key is the largest integer with fewer than k keys below it. Build it from the sign bit down.
    level = tl.full([], -0x80000000, tl.int32)
    for step in range(16):
        quarter = tl.full([], 1, tl.int32) << (30 - 2 * step)
        # starting at INT32_MIN, these sums may wrap around, which is intended
        low, mid, high = level + quarter, level + 2 * quarter, level + 3 * quarter
        counts = _count_below(score, forced, resident, start, end, low, mid, high, TILE, ONE_TILE)
        reached = ((counts & MOST) < k).to(tl.int32) + (((counts >> COUNT) & MOST) < k).to(tl.int32)
        level += quarter * (reached + ((counts >> (2 * COUNT)) < k).to(tl.int32))
    counts = _count_below(score, forced, resident, start, end, level, level, level, TILE, ONE_TILE)
    room = k - (counts & MOST).to(tl.int32)
    below_before, ties_before = 0, 0
    for first in range(start, end, TILE):
        keys = resident if ONE_TILE else _keys(score, forced, first, end, TILE)
        below, ties = (keys < level).to(tl.int32), (keys == level).to(tl.int32)
        # inclusive counts of rows below and of ties up to each row
        below_here, ties_here = below_before + tl.cumsum(below, 0), ties_before + tl.cumsum(ties, 0)
        taken = (below > 0) | ((ties > 0) & (ties_here <= room))
        slot = below_here + tl.minimum(ties_here, room) - 1
        tl.store(out + slot, (first + tl.arange(0, TILE)).to(tl.int64), mask=taken)
        below_before += tl.sum(below, 0)
        ties_before += tl.sum(ties, 0)
    for first in range(k, following - place, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        tl.store(out + slot, -1, mask=slot < following - place)


def lowest_rows(score, forced, starts, places, total):
    """See dispatch.py"""
    out = torch.empty(total, dtype=torch.int64, device=score.device)
    tile = min(padded(len(score), 512), TILE)  # powers of two limit how many kernels are compiled
    if total:
        _lowest_kernel[len(starts),](
            score,
            forced,
            starts,
            places,
            out,
            len(starts) - 1,
            total,
            TILE=tile,
            ONE_TILE=len(score) <= tile,
            SLOTS=SLOTS,
            num_warps=4 if tile <= 1024 else 8,
        )
    return out
