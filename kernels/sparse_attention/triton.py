"""Split-KV attention over chosen pages: the chosen keys of a request are split among programs, and a second kernel
merges their results by weight.

A program holds a tile of rows and walks over its share of the chosen keys, one
tile at a time. Keys are gathered one by one, so pages may have any size, even
one key. It keeps a running softmax in base 2. The merge combines the results of
all shares with the logs of their total weights, in float32. Tiles of rows are
numbered across the batch, see _request.
"""

import math

import torch
import triton
import triton.language as tl

from vllm_dlm.kernels.triton_utils import dot, load_rows, padded, processors, row_offsets, row_tile

#: maximum keys per tile, and maximum shares per request; with more shares the merge costs more than they save
KEYS, MOST_SPLITS = 64, 32
#: desired number of programs per multiprocessor; several hide the latency of loading page, place and keys in turn
SPREAD = 4
#: requests searched at once; a constant, so kernels are not recompiled for every batch size
BATCH = tl.constexpr(32)
#: maximum entries of `chosen` read at once
ENTRIES = 1024


@triton.jit
def _request(q_starts, tile, batch, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """-> the request that a tile of rows belongs to, its first query, and the tile's number within the request.

    The tiles of request b begin at b + q_starts[b] * GROUP // ROWS. This leaves enough tiles for each request, at most
    one too many, without reading its length. Tiles before the first request are unused and get a number below 0."""
    begun = tl.zeros([], tl.int32)
    for some in range(0, batch, BATCH):
        b = some + tl.arange(0, BATCH)
        starts = tl.load(q_starts + b, mask=b < batch, other=0).to(tl.int32)
        begun += tl.sum(((b < batch) & (b + starts * GROUP // ROWS <= tile)).to(tl.int32), 0)
    request = tl.maximum(begun - 1, 0)
    first = tl.load(q_starts + request).to(tl.int32)
    return request, first, tile - request - first * GROUP // ROWS


@triton.jit
def _named(chosen, width, ENTRIES: tl.constexpr):
    """Length of chosen [width] without its padding, so that padding costs no time"""
    number = 0
    for first in range(0, width, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        page = tl.load(chosen + entry, mask=entry < width, other=-1)
        number = tl.maximum(number, tl.max(tl.where(page >= 0, entry + 1, 0), 0))
    return number


@triton.jit
def _key_offsets(
    chosen,
    table,
    slot,
    named,
    tail,
    length,
    stride_block,
    stride_key,
    PAGE: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    PER_ENTRY: tl.constexpr,
):
    """-> positions, cache offsets and validity of the keys `slot` [KEYS], counted over all pages that are read: first
    the `named` entries of `chosen`, then the pages from `tail` on"""
    entry = slot // PAGE
    beyond = -1 if tail is None else entry + (tail - named)
    page = tl.load(chosen + entry, mask=entry < named, other=beyond)
    position = page * PAGE + slot % PAGE
    there = (page >= 0) & (position < length)
    physical = tl.load(table + page // PER_ENTRY, mask=there, other=0).to(tl.int64) * PER_ENTRY + page % PER_ENTRY
    inside = physical % PER_BLOCK * PAGE + slot % PAGE
    return position, physical // PER_BLOCK * stride_block + inside * stride_key, there


@triton.jit
def _neighbour_offsets(
    chosen,
    table,
    start,
    named,
    tail,
    length,
    stride_block,
    stride_key,
    PAGE: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    PER_ENTRY: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Like _key_offsets for KEYS consecutive slots from `start` on that lie in one page, which is looked up once."""
    entry = start // PAGE
    beyond = -1 if tail is None else entry + (tail - named)
    page = tl.where(entry < named, tl.load(chosen + tl.maximum(tl.minimum(entry, named - 1), 0)), beyond)
    first = page * PAGE + start % PAGE
    exists = (page >= 0) & (first < length)
    known = tl.where(exists, page, 0)
    physical = tl.load(table + known // PER_ENTRY).to(tl.int64) * PER_ENTRY + known % PER_ENTRY
    key = tl.arange(0, KEYS)
    position = first + key
    inside = physical % PER_BLOCK * PAGE + start % PAGE
    offset = physical // PER_BLOCK * stride_block + inside * stride_key + key.to(tl.int64) * stride_key
    return position, offset, (position < length) & (position >= tl.where(exists, 0, length))


@triton.jit(
    do_not_specialize=["batch", "named", "stride_table"],
    do_not_specialize_on_alignment=["q_starts", "q_ends", "table", "rows", "tails", "kv_lens"],
)
def _attend_kernel(
    q, q_starts, q_ends, cache, table, chosen, rows, tails, kv_lens, moved, places, out, lse, batch, named, slots,
    share, scale, heads, stride_q, stride_q_head, stride_block, stride_head, stride_key, stride_table, stride_chosen,
    stride_chosen_head, stride_places,
    PAGE: tl.constexpr, PER_BLOCK: tl.constexpr, PER_ENTRY: tl.constexpr, CAUSAL: tl.constexpr, SHARED: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    ENTRIES: tl.constexpr, PAGEWISE: tl.constexpr,
):  # fmt: skip
    """Stores out [Tq, H, splits, DIM] and lse [Tq, H, splits] in base 2. Unless keys are SHARED among several programs,
    out is the final result and lse is unused.
    `slots`: upper bound on keys per request; those of the `named` chosen pages come first.
    With `moved` [S, Hkv, DIM], a position's value is its row of `moved`, given by `places`, or zero if it has none."""
    h, split, splits = tl.program_id(1).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    b, first, tile = _request(q_starts, tl.program_id(0), batch, GROUP, ROWS)
    queries = tl.load(q_ends + b).to(tl.int32) - first
    row = tile * ROWS + tl.arange(0, ROWS)
    present = row < queries * GROUP
    if (tile < 0) | (tile * ROWS >= queries * GROUP):
        return
    length = tl.load(kv_lens + b).to(tl.int32)
    table += b.to(tl.int64) * stride_table
    own = b.to(tl.int64)
    tail = None
    if rows is not None:
        own = tl.load(rows + b)
    if tails is not None:
        tail = tl.load(tails + b)
    chosen += own * stride_chosen + h * stride_chosen_head
    if ENTRIES > 0:  # this request may read fewer pages than `chosen` has room for
        named = _named(chosen, named, ENTRIES)
        slots = named * PAGE
        if tails is not None:
            slots += tl.maximum(tl.cdiv(length, PAGE) - tail, 0) * PAGE
        share = tl.cdiv(tl.cdiv(slots, KEYS), splits) * KEYS
    cache += h * stride_head
    # the last position that a row sees
    last = length - queries + row // GROUP if CAUSAL else tl.zeros_like(row) + (length - 1)
    channel = tl.arange(0, DIM_PAD)
    query = load_rows(q, row_offsets(first, row, h, stride_q, stride_q_head, GROUP), present, DIM, DIM_PAD)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    context = tl.zeros([ROWS, DIM_PAD], tl.float32)
    for start in range(split * share, tl.minimum((split + 1) * share, slots), KEYS):
        if PAGEWISE:
            position, offset, there = _neighbour_offsets(
                chosen, table, start, named, tail, length, stride_block, stride_key, PAGE, PER_BLOCK, PER_ENTRY, KEYS
            )
        else:
            slot = start + tl.arange(0, KEYS)
            position, offset, there = _key_offsets(
                chosen, table, slot, named, tail, length, stride_block, stride_key, PAGE, PER_BLOCK, PER_ENTRY
            )
        # unwritten cache slots may hold anything, including NaN, so they are masked
        place = cache + offset[:, None] + channel[None, :]
        mask = there[:, None] & (channel < DIM)[None, :]
        keys = tl.load(place, mask=mask, other=0.0)
        if PAGEWISE:  # start loading values while the weights are computed
            values = tl.load(place + DIM, mask=mask, other=0.0)
        logits = dot(query, tl.trans(keys), tl.zeros([ROWS, KEYS], tl.float32)) * scale
        seen = there[None, :] & (position[None, :] <= last[:, None])
        logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - shift[:, None])
        fading = tl.exp2(highest - shift)
        if moved is not None:
            change = tl.load(places + b.to(tl.int64) * stride_places + position, mask=there, other=-1).to(tl.int64)
            place = moved + ((change * tl.num_programs(1) + h) * DIM)[:, None] + channel[None, :]
            values = tl.load(place, mask=(change >= 0)[:, None] & (channel < DIM)[None, :], other=0.0)
        elif not PAGEWISE:
            values = tl.load(place + DIM, mask=mask, other=0.0)
        total = total * fading + tl.sum(weights, 1)
        context = dot(weights.to(values.dtype), values, context * fading[:, None])
        highest = higher
    context = context / tl.where(total > 0.0, total, 1.0)[:, None]  # a row without keys gets zeros
    place = row_offsets(first, row, h, heads, 1, GROUP) * splits + split
    mask = present[:, None] & (channel < DIM)[None, :]
    tl.store(out + place[:, None] * DIM + channel[None, :], context.to(out.dtype.element_ty), mask=mask)
    if SHARED:
        tl.store(lse + place, highest + tl.log2(total), mask=present)


@triton.jit(do_not_specialize=["batch"], do_not_specialize_on_alignment=["q_starts", "q_ends"])
def _merge_kernel(
    partial,
    lse,
    out,
    q_starts,
    q_ends,
    batch,
    heads,
    SPLITS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """partial [rows, SPLITS, DIM], lse [rows, SPLITS] -> out [rows, DIM]"""
    row = tl.program_id(0).to(tl.int64)
    owners = tl.zeros([], tl.int32)
    for some in range(0, batch, BATCH):
        b = some + tl.arange(0, BATCH)
        begun = tl.load(q_starts + b, mask=b < batch, other=1 << 30) <= row // heads
        over = tl.load(q_ends + b, mask=b < batch, other=0) <= row // heads
        owners += tl.sum((begun & ~over).to(tl.int32), 0)
    if owners == 0:  # the query belongs to no request
        return
    split, channel = tl.arange(0, SPLITS), tl.arange(0, DIM_PAD)
    logs = tl.load(lse + row * SPLITS + split)
    highest = tl.max(logs, 0)
    weights = tl.exp2(logs - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(weights, 0)
    place = (row * SPLITS + split)[:, None] * DIM + channel[None, :]
    parts = tl.load(partial + place, mask=(channel < DIM)[None, :], other=0.0)
    merged = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out + row * DIM + channel, merged.to(out.dtype.element_ty), mask=channel < DIM)


def _splits(tiles: int, programs: int, device: torch.device) -> int:
    """Number of shares for `tiles` tiles of keys, so that all multiprocessors have work. It is a power of two, because
    it is a compile-time constant of the merging kernel."""
    wanted = min(SPREAD * processors(device) // programs, tiles, MOST_SPLITS)
    return 1 << max(wanted, 1).bit_length() - 1


def _tiles(q: torch.Tensor, batch: int, group: int) -> dict:
    """Tile sizes: as large as registers hold without spilling. Four pipeline stages: load a key's page, load its place,
    load the key, and compute. float32 does not use tensor cores and needs only one."""
    queries, _, dim = q.shape
    if q.element_size() > 2:
        return {"ROWS": 16, "KEYS": min(KEYS, 32), "num_warps": 4 if dim <= 128 else 8, "num_stages": 1}
    wide = dim > 128
    rows = row_tile(queries, batch, group, 32 if wide else 64)
    keys = min(KEYS, 32 if wide else 64)
    return {"ROWS": rows, "KEYS": keys, "num_warps": 8 if rows == 64 else 4, "num_stages": 4}


def sparse_attention(q, *arguments):
    """See dispatch.py"""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    sparse_attention_into(out, q, *arguments)
    return out


def sparse_attention_into(
    out, q, q_starts, q_ends, cache, page_table, chosen, kv_lens, page_size, scale, causal, table_pages, moved, places,
    rows, tails, tail,
):  # fmt: skip
    """See dispatch.py"""
    (queries, heads, dim), batch = q.shape, len(page_table)
    kv_heads, block_size = cache.shape[1:3]
    if not out.numel():
        return
    if moved is not None:
        moved = moved.contiguous()
    chosen = chosen if chosen.stride(2) == 1 else chosen.contiguous()
    group, named = heads // kv_heads, chosen.shape[2]
    width, tiles = named + tail, _tiles(q, batch, group)
    row_tiles = batch + queries * group // tiles["ROWS"]
    key_tiles = triton.cdiv(width * page_size, tiles["KEYS"])
    splits = _splits(key_tiles, row_tiles * kv_heads, q.device)
    partial, lse = out, None
    if splits > 1:
        partial = torch.empty(queries, heads, splits, dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(queries, heads, splits, dtype=torch.float32, device=q.device)
    single = queries == batch
    _attend_kernel[row_tiles, kv_heads, splits](
        q, q_starts, q_ends, cache, page_table, chosen, rows, tails, kv_lens, moved, places, partial, lse, batch,
        named, width * page_size, triton.cdiv(key_tiles, splits) * tiles["KEYS"], scale * math.log2(math.e), heads,
        *q.stride()[:2], *cache.stride()[:3], page_table.stride(0), *chosen.stride()[:2],
        0 if places is None else places.stride(0),
        PAGE=page_size, PER_BLOCK=block_size // page_size, PER_ENTRY=table_pages, CAUSAL=causal, SHARED=splits > 1,
        GROUP=group, DIM=dim, DIM_PAD=padded(dim, 16),
        # in decoding, `chosen` is often padded
        ENTRIES=min(padded(named, 32), ENTRIES) if single else 0,
        # only if registers hold both keys and values
        PAGEWISE=single and moved is None and q.element_size() == 2 and dim <= 128 and page_size % tiles["KEYS"] == 0,
        **tiles,
    )  # fmt: skip
    if splits > 1:
        inputs, shape = (partial, lse, out, q_starts, q_ends, batch, heads), {"DIM": dim, "DIM_PAD": padded(dim, 16)}
        _merge_kernel[queries * heads,](*inputs, SPLITS=splits, **shape)
