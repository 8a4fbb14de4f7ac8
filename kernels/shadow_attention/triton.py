"""One pass with a running softmax: first over the keys of the shadow rows, then over the cached keys of the canvas.

Each program computes a tile of rows of one canvas.
"""

import math

import torch
import triton
import triton.language as tl

from vllm_dlm.kernels.triton_utils import dot, load_rows, padded, processors, row_offsets


@triton.jit
def _with_keys(query, keys, values, seen, scale, highest, total, context):
    """Adds one tile of keys to the running softmax. Every row must have seen at least one key after the tile."""
    logits = dot(query, tl.trans(keys), tl.zeros(seen.shape, tl.float32)) * scale
    logits = tl.where(seen, logits, float("-inf"))
    higher = tl.maximum(highest, tl.max(logits, 1))
    weights = tl.exp2(logits - higher[:, None])
    fading = tl.exp2(highest - higher)
    context = dot(weights.to(values.dtype), values, context * fading[:, None])
    return higher, total * fading + tl.sum(weights, 1), context


@triton.jit(
    do_not_specialize=["stride_table"],
    do_not_specialize_on_alignment=["q_starts", "hidden", "k_starts", "tables", "kv_lens"],
)
def _shadow_kernel(
    q, q_starts, hidden, k, v, k_starts, cache, tables, kv_lens, out, scale, heads,
    stride_q, stride_q_head, stride_k, stride_k_head, stride_v, stride_v_head, stride_block, stride_head, stride_key,
    stride_table,
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
    channel = tl.arange(0, DIM_PAD)
    inside = (channel < DIM)[None, :]
    query = load_rows(q, row_offsets(first, row, h, stride_q, stride_q_head, GROUP), row < rows, DIM, DIM_PAD)
    hole = tl.load(hidden + first + row // GROUP, mask=row < rows, other=-1)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    context = tl.zeros([ROWS, DIM_PAD], tl.float32)
    begin = tl.load(k_starts + c).to(tl.int32)
    shadow = tl.load(k_starts + c + 1).to(tl.int32) - begin
    for start in range(0, shadow, KEYS):
        place = start + tl.arange(0, KEYS)
        there = place < shadow
        own = (begin + place).to(tl.int64)[:, None]
        mask = there[:, None] & inside
        keys = tl.load(k + own * stride_k + h * stride_k_head + channel[None, :], mask=mask, other=0.0)
        values = tl.load(v + own * stride_v + h * stride_v_head + channel[None, :], mask=mask, other=0.0)
        seen = there[None, :] & (row >= 0)[:, None]
        highest, total, context = _with_keys(query, keys, values, seen, scale, highest, total, context)
    length = tl.load(kv_lens + c).to(tl.int32)
    for start in range(0, length, KEYS):
        position = start + tl.arange(0, KEYS)
        there = position < length
        block = tl.load(tables + c * stride_table + position // BLOCK, mask=there, other=0).to(tl.int64)
        offset = block * stride_block + h * stride_head + position % BLOCK * stride_key
        # unwritten cache slots may hold anything, including NaN, so they are masked
        mask = there[:, None] & inside
        keys = tl.load(cache + offset[:, None] + channel[None, :], mask=mask, other=0.0)
        values = tl.load(cache + offset[:, None] + DIM + channel[None, :], mask=mask, other=0.0)
        seen = there[None, :] & (position[None, :] != hole[:, None])
        highest, total, context = _with_keys(query, keys, values, seen, scale, highest, total, context)
    offsets = row_offsets(first, row, h, heads * DIM, DIM, GROUP)
    mask = (row < rows)[:, None] & inside
    context = context / total[:, None]
    tl.store(out + offsets[:, None] + channel[None, :], context.to(out.dtype.element_ty), mask=mask)


def _tiles(q, rows: int, programs: int) -> dict:
    """Tile sizes: as large as registers hold without spilling, with few enough rows that all multiprocessors have work.
    `programs`: number of programs per tile of rows."""
    dim = q.shape[2]
    if q.element_size() > 2:
        return {"ROWS": 16, "KEYS": 32, "num_warps": 4 if dim <= 128 else 8, "num_stages": 1}
    most = 32 if programs * triton.cdiv(rows, 64) < processors(q.device) else 64
    return {"ROWS": min(padded(rows, 16), most), "KEYS": 32 if dim > 128 else 64, "num_warps": 4, "num_stages": 2}


def shadow_attention(q, q_starts, hidden, k, v, k_starts, cache, tables, kv_lens, scale, max_q):
    """See dispatch.py"""
    (_, heads, dim), canvases = q.shape, len(tables)
    kv_heads, block_size = cache.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows = max_q * (heads // kv_heads)
    if len(q) and rows and canvases:
        tiles = _tiles(q, rows, kv_heads * canvases)
        _shadow_kernel[triton.cdiv(rows, tiles["ROWS"]), kv_heads, canvases](
            q, q_starts, hidden, k, v, k_starts, cache, tables, kv_lens, out, scale * math.log2(math.e), heads,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *cache.stride()[:3], tables.stride(0),
            BLOCK=block_size, GROUP=heads // kv_heads, DIM=dim, DIM_PAD=padded(dim, 16), **tiles,
        )  # fmt: skip
    return out
