"""The chosen keys of a request are split among programs; what each of them finds is merged by weight.

A program holds a tile of rows and walks over its share of the chosen keys, a
tile at a time, gathered key by key: pages may be of any size, single keys
included. It keeps a running softmax in base 2. Its result and the log of its
total weight are merged with those of the other shares, all in float32.
Tiles of rows are numbered through the batch, see _request.
"""

import math

import torch
import triton
import triton.language as tl

from vllm_dlm.kernels.triton_utils import dot, load_rows, padded, processors, row_offsets, row_tile

#: keys of a tile at most, and shares that the keys of a request may have: more take longer to merge than they save
KEYS, MOST_SPLITS = 64, 32
#: programs per processor that there should be: a program waits for a page's number, its place and its keys in turn
SPREAD = 4
#: requests that are looked through together: kernels are compiled for no number of them
BATCH = tl.constexpr(32)
#: entries of `chosen` that are looked at together
ENTRIES = 1024


@triton.jit
def _request(q_starts, tile, batch, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Which request a tile of rows belongs to, and the tile's number there. The tiles of request b begin at
    b + q_starts[b] * GROUP // ROWS: room for the rows of each, at most one tile too many, and no look at lengths.
    Tiles before the first request's are nobody's: they get a number below 0."""
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
    """Up to where chosen [width] names pages: what is left of a wide list costs no time"""
    number = 0
    for first in range(0, width, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        page = tl.load(chosen + entry, mask=entry < width, other=-1)
        number = tl.maximum(number, tl.max(tl.where(page >= 0, entry + 1, 0), 0))
    return number


@triton.jit
def _key_offsets(
    chosen, table, slot, named, tail, length, stride_block, stride_key, PAGE: tl.constexpr, PER_BLOCK: tl.constexpr,
    PER_ENTRY: tl.constexpr,
):  # fmt: skip
    """The keys in places `slot` [KEYS] of the pages that are read, `named` of them chosen, then those from `tail` on:
    their positions, where they lie, whether they are there"""
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
    chosen, table, start, named, tail, length, stride_block, stride_key, PAGE: tl.constexpr, PER_BLOCK: tl.constexpr,
    PER_ENTRY: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The same of the KEYS places from `start` on where those are of one page, which is looked up once."""
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
    """out [Tq, H, splits, DIM] and lse [Tq, H, splits], of base 2; unless keys are SHARED out among programs out is the
    result, lse unused.
    Of a request's `slots` keys at most, those of `named` pages come first.
    With `moved` [S, Hkv, DIM] those are the values, of the positions that `places` gives one."""
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
    if ENTRIES > 0:  # this request may read fewer than the one that reads most
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
        # what nobody wrote may be anything, NaN included, and is not read
        place = cache + offset[:, None] + channel[None, :]
        mask = there[:, None] & (channel < DIM)[None, :]
        keys = tl.load(place, mask=mask, other=0.0)
        if PAGEWISE:  # under way while the weights are found
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
    context = context / tl.where(total > 0.0, total, 1.0)[:, None]  # a row that saw nothing keeps zeros
    place = row_offsets(first, row, h, heads, 1, GROUP) * splits + split
    mask = present[:, None] & (channel < DIM)[None, :]
    tl.store(out + place[:, None] * DIM + channel[None, :], context.to(out.dtype.element_ty), mask=mask)
    if SHARED:
        tl.store(lse + place, highest + tl.log2(total), mask=present)


@triton.jit(do_not_specialize=["batch"], do_not_specialize_on_alignment=["q_starts", "q_ends"])
def _merge_kernel(
    partial, lse, out, q_starts, q_ends, batch, heads, SPLITS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
):  # fmt: skip
    """partial [rows, SPLITS, DIM], lse [rows, SPLITS] -> out [rows, DIM]"""
    row = tl.program_id(0).to(tl.int64)
    owners = tl.zeros([], tl.int32)
    for some in range(0, batch, BATCH):
        b = some + tl.arange(0, BATCH)
        begun = tl.load(q_starts + b, mask=b < batch, other=1 << 30) <= row // heads
        over = tl.load(q_ends + b, mask=b < batch, other=0) <= row // heads
        owners += tl.sum((begun & ~over).to(tl.int32), 0)
    if owners == 0:  # nobody's
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
    """Shares of `tiles` tiles of keys: enough that all processors have work; a power of two, which the merging kernel
    is compiled for."""
    wanted = min(SPREAD * processors(device) // programs, tiles, MOST_SPLITS)
    return 1 << max(wanted, 1).bit_length() - 1


def _tiles(q: torch.Tensor, batch: int, group: int) -> dict:
    """Rows and keys of a tile: what registers hold without spilling. A stage each for a key's page, its place in the
    cache, the key itself and the products with it; float32 has no tensor cores to feed."""
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
        # rows that generate may name fewer pages than there are places
        ENTRIES=min(padded(named, 32), ENTRIES) if single else 0,
        # as long as the registers hold keys and values
        PAGEWISE=single and moved is None and q.element_size() == 2 and dim <= 128 and page_size % tiles["KEYS"] == 0,
        **tiles,
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[queries * heads,](
            partial, lse, out, q_starts, q_ends, batch, heads, SPLITS=splits, DIM=dim, DIM_PAD=padded(dim, 16),
        )  # fmt: skip
