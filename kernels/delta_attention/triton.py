"""One pass over the cached keys with a running softmax; value changes are read and multiplied only for tiles of keys
that contain a changed one.

Each program computes a tile of rows of one canvas. All keys contribute to the
normalizer, only changed ones to the sum.
"""

import math

import torch
import triton
import triton.language as tl

from vllm_dlm.kernels.triton_utils import dot, load_rows, padded, processors, row_offsets


@triton.jit
def _key_offsets(table, start, position, there, stride_block, stride_key, BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """Cache offsets of the keys at `position` [KEYS], whose first is `start`"""
    if BLOCK % KEYS == 0:  # a tile never crosses a block boundary
        block = tl.load(table + start // BLOCK).to(tl.int64) * stride_block
    else:
        block = tl.load(table + position // BLOCK, mask=there, other=0).to(tl.int64) * stride_block
    return block + position % BLOCK * stride_key


@triton.jit(
    do_not_specialize=["stride_table", "stride_place"],
    do_not_specialize_on_alignment=["q_starts", "tables", "kv_lens", "place"],
)
def _delta_kernel(
    q, q_starts, cache, tables, kv_lens, place, moved, out, scale, heads,
    stride_q, stride_q_head, stride_block, stride_head, stride_key, stride_table, stride_place, stride_moved,
    stride_moved_head,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """out [n, H, DIM]"""
    tile, h, c = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first = tl.load(q_starts + c).to(tl.int32)
    rows = (tl.load(q_starts + c + 1).to(tl.int32) - first) * GROUP
    if tile * ROWS >= rows:
        return
    row = tile * ROWS + tl.arange(0, ROWS)
    length = tl.load(kv_lens + c).to(tl.int32)
    tables += c * stride_table
    place += c * stride_place
    cache += h * stride_head
    moved += h * stride_moved_head
    channel = tl.arange(0, DIM_PAD)
    inside = (channel < DIM)[None, :]
    query = load_rows(q, row_offsets(first, row, h, stride_q, stride_q_head, GROUP), row < rows, DIM, DIM_PAD)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    context = tl.zeros([ROWS, DIM_PAD], tl.float32)
    for start in range(0, length, KEYS):
        position = start + tl.arange(0, KEYS)
        there = position < length
        offset = _key_offsets(tables, start, position, there, stride_block, stride_key, BLOCK, KEYS)
        # unwritten cache slots may hold anything, including NaN, so they are masked
        keys = tl.load(cache + offset[:, None] + channel[None, :], mask=there[:, None] & inside, other=0.0)
        logits = dot(query, tl.trans(keys), tl.zeros([ROWS, KEYS], tl.float32)) * scale
        logits = tl.where(there[None, :], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))  # finite: every tile has at least one key
        weights = tl.exp2(logits - higher[:, None])
        fading = tl.exp2(highest - higher)
        total = total * fading + tl.sum(weights, 1)
        context = context * fading[:, None]
        slot = tl.load(place + position, mask=there, other=-1)
        if tl.max(slot, 0) >= 0:
            source = moved + slot.to(tl.int64)[:, None] * stride_moved + channel[None, :]
            values = tl.load(source, mask=(slot >= 0)[:, None] & inside, other=0.0)
            context = dot(weights.to(values.dtype), values, context)
        highest = higher
    context = context / tl.where(total > 0.0, total, 1.0)[:, None]  # without keys the result is zero
    offsets = row_offsets(first, row, h, heads * DIM, DIM, GROUP)
    mask = (row < rows)[:, None] & inside
    tl.store(out + offsets[:, None] + channel[None, :], context.to(out.dtype.element_ty), mask=mask)


def _tiles(q, rows: int, programs: int, max_kv: int) -> dict:
    """Tile sizes: as large as registers hold without spilling, and small enough that all multiprocessors have work.
    `programs`: number of programs per tile of rows."""
    dim = q.shape[2]
    if q.element_size() > 2:
        return {"ROWS": 16, "KEYS": min(padded(max_kv, 16), 32), "num_warps": 4 if dim <= 128 else 8, "num_stages": 1}
    most = 64 if dim > 128 or programs * triton.cdiv(rows, 128) < processors(q.device) else 128
    count = min(padded(rows, 16), most)
    keys = min(padded(max_kv, 16), 32 if dim > 128 else 64)
    return {"ROWS": count, "KEYS": keys, "num_warps": 8 if count == 128 or dim > 128 else 4, "num_stages": 3}


def delta_over_pages(q, q_starts, cache, tables, kv_lens, place, moved, scale, max_q, max_kv):
    """See dispatch.py"""
    (_, heads, dim), canvases = q.shape, len(tables)
    kv_heads, block_size = cache.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows = max_q * (heads // kv_heads)
    if len(q) and rows and canvases:
        tiles = _tiles(q, rows, kv_heads * canvases, max_kv)
        _delta_kernel[triton.cdiv(rows, tiles["ROWS"]), kv_heads, canvases](
            q, q_starts, cache, tables, kv_lens, place, moved, out, scale * math.log2(math.e), heads,
            *q.stride()[:2], *cache.stride()[:3], tables.stride(0), place.stride(0), *moved.stride()[:2],
            BLOCK=block_size, GROUP=heads // kv_heads, DIM=dim, DIM_PAD=padded(dim, 16), **tiles,
        )  # fmt: skip
    return out
