"""One program per tile counts the marked rows before its tile, then lists its own. One more program per canvas start
counts the marked rows before it."""

import torch
import triton
import triton.language as tl

from vllm_dlm.kernels.triton_utils import padded

#: rows per tile
TILE = 1024


@triton.jit
def _marked(mask, start, end, TILE: tl.constexpr):
    row = start + tl.arange(0, TILE)
    return tl.load(mask + row, mask=row < end, other=0).to(tl.int32)


@triton.jit
def _count(mask, end, TILE: tl.constexpr):
    """Number of marked rows before `end`"""
    marked = tl.zeros([TILE], tl.int32)
    for start in range(0, end, TILE):
        marked += _marked(mask, start, end, TILE)
    return tl.sum(marked, 0)


@triton.jit(
    do_not_specialize=["rows", "canvases", "capacity", "tiles"], do_not_specialize_on_alignment=["mask", "starts"]
)
def _compact_kernel(mask, starts, index, counts, rows, canvases, capacity, tiles, TILE: tl.constexpr):
    part = tl.program_id(0)
    if starts is not None:
        if part >= tiles:
            number = _count(mask, tl.load(starts + part - tiles).to(tl.int32), TILE)
            tl.store(counts + part - tiles, tl.minimum(number, capacity))
            return
        rows = tl.load(starts + canvases).to(tl.int32)
    before = _count(mask, tl.minimum(part * TILE, rows), TILE)
    marked = _marked(mask, part * TILE, rows, TILE)
    place = before + tl.cumsum(marked, 0) - 1
    row = part * TILE + tl.arange(0, TILE)
    tl.store(index + place, row.to(tl.int64), mask=(marked > 0) & (place < capacity))
    if part == tiles - 1:
        for first in range(before + tl.sum(marked, 0), capacity, TILE):
            slot = first + tl.arange(0, TILE)
            tl.store(index + slot, tl.full([TILE], -1, tl.int64), mask=slot < capacity)


def compact_rows(mask, starts, capacity):
    """See dispatch.py; counts are empty without `starts`"""
    index = torch.empty(capacity, dtype=torch.int64, device=mask.device)
    counts = torch.empty(0 if starts is None else len(starts), dtype=torch.int32, device=mask.device)
    tile = min(padded(len(mask), 128), TILE)
    tiles = max(triton.cdiv(len(mask), tile), 1)
    _compact_kernel[tiles + len(counts),](
        mask, starts, index, counts, len(mask), len(counts) - 1, capacity, tiles, TILE=tile, num_warps=4
    )
    return index, counts
