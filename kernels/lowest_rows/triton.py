"""The highest score that is taken is found two bits at a time, then the rows below it and the first that tie are
written in order.

One program per canvas. As integers of the same order, scores can be searched
exactly: each of 16 steps counts the rows below three candidates, in one sum.
"""

import torch
import triton
import triton.language as tl

from vllm_dlm.kernels.triton_utils import padded

#: a canvas of this many rows stays in registers, longer ones are read again in every step
TILE = 2048
#: places that are filled at once with what is nobody's
SLOTS = 1024
#: the integers of rows that are forced, of scores that are no number, and of rows that are not there
FORCED, NO_NUMBER, NO_ROW = tl.constexpr(-0x80000000), tl.constexpr(0x7FFFFFFE), tl.constexpr(0x7FFFFFFF)
#: bits of a count, of which three make an integer of 64; no canvas has more rows
COUNT, MOST = tl.constexpr(21), tl.constexpr((1 << 21) - 1)


@triton.jit
def _keys(score, forced, start, end, TILE: tl.constexpr):
    """Rows start … start + TILE - 1 as int32 in the order in which they are taken"""
    row = start + tl.arange(0, TILE)
    value = tl.load(score + row, mask=row < end, other=0.0)
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)  # -0 ties with 0
    # of negative numbers the larger magnitude is the smaller number
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(value != value, NO_NUMBER, key)
    key = tl.where(tl.load(forced + row, mask=row < end, other=0) != 0, FORCED, key)
    return tl.where(row < end, key, NO_ROW)


@triton.jit
def _below(keys, low, mid, high):
    """How many keys lie below each of three bounds"""
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
    score, forced, starts, places, out, canvases, total, TILE: tl.constexpr, ONE_TILE: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    if c == canvases:  # what is no canvas's
        for first in range(tl.load(places + canvases).to(tl.int32), total, SLOTS):
            slot = first + tl.arange(0, SLOTS)
            tl.store(out + slot, -1, mask=slot < total)
        return
    start, end = tl.load(starts + c).to(tl.int32), tl.load(starts + c + 1).to(tl.int32)
    place, following = tl.load(places + c).to(tl.int32), tl.load(places + c + 1).to(tl.int32)
    k = tl.minimum(following - place, end - start)
    out += place
    resident = _keys(score, forced, start, end, TILE)
    # the largest integer that fewer than k keys lie below is the k-th lowest key: it is built from the sign down
    level = tl.full([], -0x80000000, tl.int32)
    for step in range(16):
        quarter = tl.full([], 1, tl.int32) << (30 - 2 * step)
        # signs count downwards, and sums wrap around as they should
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
        # rows up to and including this one that are below, and that tie
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
    tile = min(padded(len(score), 512), TILE)  # few sizes, each of which is compiled
    if total:
        _lowest_kernel[len(starts),](
            score, forced, starts, places, out, len(starts) - 1, total, TILE=tile, ONE_TILE=len(score) <= tile,
            SLOTS=SLOTS, num_warps=4 if tile <= 1024 else 8,
        )  # fmt: skip
    return out
