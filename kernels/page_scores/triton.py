"""Each program scores a run of pages for all rows of a request: one product per tile of means, reduced over the rows.

The rows-by-pages matrix is never stored. `softmax_sum` needs each row's
normalizer first. A separate pass stores the log-sum-exp of each row over each
run of pages, and the scoring pass merges them.

`half_scores` differs only in the source of a tile's means: it computes them
from the keys, SIZE keys per half, instead of reading statistics (SIZE = 0). See
loads.py.
"""

import torch
import triton
import triton.language as tl

from vllm_dlm.kernels.page_scores import naive
from vllm_dlm.kernels.page_scores.loads import load_pages
from vllm_dlm.kernels.page_scores.queries import ScoringQueries
from vllm_dlm.kernels.triton_utils import dot, load_rows, padded, processors, row_offsets, row_tile

FORCED, LOWEST = tl.constexpr(naive.FORCED), tl.constexpr(naive.LOWEST)
#: pages per tile, maximum rows per tile, and maximum number of runs of pages with `softmax_sum`
PAGES, MOST_ROWS, MOST_CHUNKS = 64, 32, 32
#: desired number of programs per multiprocessor, except for tiles that hold more
SPREAD = 8


@triton.jit
def _electing(voters, first, rows, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Number of rows of a request that are marked as voters; 0 means that all rows vote."""
    number = tl.zeros([], tl.int32)
    if voters is not None:
        for start in range(0, rows, ROWS):
            row = start + tl.arange(0, ROWS)
            number += tl.sum((tl.load(voters + first + row // GROUP, mask=row < rows, other=0) != 0).to(tl.int32), 0)
    return number


@triton.jit
def _votes(voters, number, first, row, rows, GROUP: tl.constexpr):
    """Which rows vote, [R] bool"""
    there = row < rows
    if voters is not None:
        named = tl.load(voters + first + row // GROUP, mask=there, other=0).to(tl.int32)
        there = there & (named + (number == 0).to(tl.int32) > 0)
    return there


@triton.jit
def _logits(
    rows,
    means,
    spreads,
    lam,
    sharpness,
    SHARP: tl.constexpr,
    STD_KIND: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
):
    """rows [R, DIM_PAD], means [PAGES, DIM_PAD], spreads [PAGES, WIDTH_PAD] -> [R, PAGES] float32, see __init__.py"""
    scale: tl.constexpr = DIM**-0.5
    if SHARP:
        rows = (rows.to(tl.float32) * sharpness).to(rows.dtype)
    exact = rows.to(tl.float32)
    logits = tl.zeros([rows.shape[0], means.shape[0]], tl.float32)
    if STD_KIND == "vector":
        # lam is inside the product, so both products share one accumulator
        weighted = (tl.abs(exact) * lam).to(means.dtype)
        logits = dot(weighted, tl.trans(spreads.to(means.dtype)), logits)
    logits = dot(rows.to(means.dtype), tl.trans(means), logits) * scale
    if STD_KIND == "diag2":
        channel, part = tl.arange(0, rows.shape[1]), tl.arange(0, spreads.shape[1])
        for group in tl.static_range(WIDTH):
            # like torch.tensor_split: the first DIM % WIDTH groups have one extra channel
            size = DIM // WIDTH + (group < DIM % WIDTH)
            first = group * (DIM // WIDTH) + min(group, DIM % WIDTH)
            inside = (channel >= first) & (channel < first + size)
            energy = tl.sum(tl.where(inside[None, :], exact * exact, 0.0), 1)
            spread = tl.sum(tl.where((part == group)[None, :], spreads, 0.0), 1)
            logits += energy[:, None] * spread[None, :] * (lam / DIM)
    elif STD_KIND == "l2" or STD_KIND == "rms":
        length = tl.sqrt(tl.sum(exact * exact, 1))
        logits += length[:, None] * tl.sum(spreads, 1)[None, :] * (lam * scale)
    return logits


@triton.jit
def _normaliser(lse, offsets, there, CHUNKS: tl.constexpr):
    """Merges the log-sum-exps of each run of pages [rows, CHUNKS] into that of the whole row [R]. It is infinite or NaN
    if the softmax is undefined."""
    chunk = tl.arange(0, CHUNKS)
    # the launch that computed the parts had the same grid
    exists = there[:, None] & (chunk < tl.num_programs(2))[None, :]
    parts = tl.load(lse + offsets[:, None] * CHUNKS + chunk[None, :], mask=exists, other=float("-inf"))
    highest = tl.max(parts, 1)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    return highest + tl.log(tl.sum(tl.exp(parts - highest[:, None]), 1))


@triton.jit
def _request(q_starts, q_ends, num_pages, forced_from, sinks, GROUP: tl.constexpr, SINKS: tl.constexpr):
    """-> for this program's request: first query, number of rows, number of pages, first forced page at the end, number
    of sink pages"""
    b = tl.program_id(0)
    first = tl.load(q_starts + b)
    rows = (tl.load(q_ends + b) - first) * GROUP
    sink = sinks
    if SINKS:  # one number per request
        sink = tl.load(sinks + b).to(tl.int32)
    return first, rows, tl.load(num_pages + b), tl.load(forced_from + b), sink


@triton.jit(
    do_not_specialize=["stride_table"],
    do_not_specialize_on_alignment=["q_starts", "q_ends", "voters", "table", "num_pages", "forced_from", "sinks"],
)
def _lse_kernel(
    q, q_starts, q_ends, voters, mean, spread, table, runs, num_pages, forced_from, sinks, lse, width, tiles, lam,
    sharpness, stride_q, stride_q_head, stride_mean, stride_mean_head, stride_mean_node, stride_spread,
    stride_spread_head, stride_spread_node, stride_table, heads,
    STD_KIND: tl.constexpr, NODES: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, ROWS: tl.constexpr, PAGES: tl.constexpr,
    CHUNKS: tl.constexpr, SINKS: tl.constexpr, SHARP: tl.constexpr,
):  # fmt: skip
    """Stores lse [Tq, H, CHUNKS]: log-sum-exp of each row over the pages of a run that are not forced"""
    h, chunk = tl.program_id(1), tl.program_id(2)
    first, rows, count, forced_at, sink = _request(q_starts, q_ends, num_pages, forced_from, sinks, GROUP, SINKS)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        queries = load_rows(q, row_offsets(first, row, h, stride_q, stride_q_head, GROUP), row < rows, DIM, DIM_PAD)
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for tile in range(chunk * tiles, tl.minimum((chunk + 1) * tiles, tl.cdiv(width, PAGES))):
            position = tile * PAGES + tl.arange(0, PAGES)
            means, spreads, unknown, there, _ = load_pages(
                mean, spread, table, runs, position, count, width, stride_mean, stride_mean_head, stride_mean_node,
                stride_spread, stride_spread_head, stride_spread_node, stride_table,
                STD_KIND, NODES, SIZE, DIM, DIM_PAD, WIDTH, WIDTH_PAD,
            )  # fmt: skip
            logits = _logits(queries, means, spreads, lam, sharpness, SHARP, STD_KIND, WIDTH, DIM)
            compete = there & (position >= sink) & (position < forced_at) & (unknown == 0)
            logits = tl.where(compete[None, :] & (logits == logits), logits, float("-inf"))
            higher = tl.maximum(highest, tl.max(logits, 1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(highest - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
            highest = higher
        value = tl.where(highest == float("-inf"), highest, highest + tl.log(total))
        tl.store(lse + row_offsets(first, row, h, heads, 1, GROUP) * CHUNKS + chunk, value, mask=row < rows)


@triton.jit(
    do_not_specialize=["stride_table"],
    do_not_specialize_on_alignment=["q_starts", "q_ends", "voters", "table", "num_pages", "forced_from", "sinks"],
)
def _score_kernel(
    q, q_starts, q_ends, voters, mean, spread, table, runs, num_pages, forced_from, sinks, lse, scores, names, width,
    tiles, lam, sharpness, stride_q, stride_q_head, stride_mean, stride_mean_head, stride_mean_node, stride_spread,
    stride_spread_head, stride_spread_node, stride_table, heads,
    REDUCE: tl.constexpr, STD_KIND: tl.constexpr, NODES: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, ROWS: tl.constexpr,
    PAGES: tl.constexpr, CHUNKS: tl.constexpr, SINKS: tl.constexpr, SHARP: tl.constexpr,
):  # fmt: skip
    """Stores scores and names [B, Hkv, width]"""
    b, h, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, rows, count, forced_at, sink = _request(q_starts, q_ends, num_pages, forced_from, sinks, GROUP, SINKS)
    number = _electing(voters, first, rows, GROUP, ROWS)
    place = (b.to(tl.int64) * tl.num_programs(1) + h) * width
    for tile in range(chunk * tiles, tl.minimum((chunk + 1) * tiles, tl.cdiv(width, PAGES))):
        position = tile * PAGES + tl.arange(0, PAGES)
        means, spreads, unknown, there, name = load_pages(
            mean, spread, table, runs, position, count, width, stride_mean, stride_mean_head, stride_mean_node,
            stride_spread, stride_spread_head, stride_spread_node, stride_table,
            STD_KIND, NODES, SIZE, DIM, DIM_PAD, WIDTH, WIDTH_PAD,
        )  # fmt: skip
        score = tl.full([PAGES], float("-inf") if REDUCE == "max" else 0.0, tl.float32)
        broken = tl.zeros([PAGES], tl.int32)
        for start in range(0, rows, ROWS):
            row = start + tl.arange(0, ROWS)
            votes = _votes(voters, number, first, row, rows, GROUP)
            queries = load_rows(q, row_offsets(first, row, h, stride_q, stride_q_head, GROUP), votes, DIM, DIM_PAD)
            logits = _logits(queries, means, spreads, lam, sharpness, SHARP, STD_KIND, WIDTH, DIM)
            # tl.maximum ignores NaN, so NaN is tracked separately
            broken = tl.maximum(broken, tl.max((votes[:, None] & (logits != logits)).to(tl.int32), 0))
            if REDUCE == "max":
                score = tl.maximum(score, tl.max(tl.where(votes[:, None], logits, float("-inf")), 0))
            elif REDUCE == "mean":
                score += tl.sum(tl.where(votes[:, None], logits, 0.0), 0) / tl.where(number > 0, number, rows)
            else:
                norm = _normaliser(lse, row_offsets(first, row, h, heads, 1, GROUP), votes, CHUNKS)
                sensible = votes & (tl.abs(norm) < float("inf"))
                score += tl.sum(tl.where(sensible[:, None], tl.exp(logits - norm[:, None]), 0.0), 0)
        score = tl.where((broken > 0) | (score != score), LOWEST, score)
        score = tl.minimum(tl.maximum(score, LOWEST), FORCED / 10)
        forced = (position < sink) | (position >= forced_at) | (unknown > 0)
        score = tl.where(there, tl.where(forced, FORCED, score), float("-inf"))
        tl.store(scores + place + position, score, mask=position < width)
        if SIZE > 0:
            tl.store(names + place + position, name, mask=position < width)


def _chunks(tiles: int, programs: int, most: int, spread: int, device: torch.device) -> tuple[int, int]:
    """-> number of runs of pages and tiles per run, so that all multiprocessors have work"""
    chunks = min(max(spread * processors(device) // programs, 1), tiles, most)
    each = triton.cdiv(tiles, chunks)
    return triton.cdiv(tiles, each), each


def page_scores(q, starts, ends, voters, mean, spread, table, num_pages, forced_from, sinks, number_of_sinks, *rule):
    """See dispatch.py"""
    std_kind, lam, reduce, sharpness = rule
    shape = len(table), mean.shape[1], table.shape[1] * mean.shape[2]
    scores = torch.empty(shape, dtype=torch.float32, device=q.device)
    marks = num_pages, forced_from, number_of_sinks if sinks is None else sinks
    queries = ScoringQueries(q, starts, ends, lam, reduce, voters, sharpness)
    _launch(queries, (mean, spread), (table, None), marks, (scores, None), std_kind, 0)
    return scores


def half_scores(q, starts, ends, voters, cache, block_table, runs, size, forced_from, sinks, *rule):
    """See dispatch.py"""
    lam, reduce, sharpness = rule
    batch, kv_heads, count = runs.shape
    scores = torch.empty(batch, kv_heads, 2 * count, dtype=torch.float32, device=q.device)
    halves = torch.empty(scores.shape, dtype=torch.int32, device=q.device)
    keys = cache.narrow(3, 0, q.shape[2])
    marks, std_kind = (forced_from, forced_from, sinks), "vector" if lam else "none"
    queries = ScoringQueries(q, starts, ends, lam, reduce, voters, sharpness)
    _launch(queries, (keys, keys), (block_table, runs), marks, (scores, halves), std_kind, size)
    return scores, halves


def _launch(queries: ScoringQueries, vectors, tables, marks, outputs, std_kind: str, size: int) -> None:
    """Launches the kernels. `marks`: number of pages, first forced page, and sinks of each request; `outputs`: scores
    [B, Hkv, width], and names of the same shape or None"""
    (batch, kv_heads, width), (count, heads, dim) = outputs[0].shape, queries.q.shape
    if not outputs[0].numel():
        return
    (mean, spread), reduce = vectors, queries.reduce
    # spreads per channel take more registers, and so do keys that are reduced to statistics on the fly
    held = (std_kind == "vector") + (size > 1)
    pages = min(PAGES, 64 >> held)
    most = MOST_CHUNKS if reduce == "softmax_sum" else 1 << 15
    programs, device = batch * kv_heads, queries.q.device
    chunks, tiles = _chunks(triton.cdiv(width, pages), programs, most, 2 if held else SPREAD, device)
    voters = None if queries.voters is None else queries.voters.view(torch.int8)
    inputs = queries.q, queries.starts, queries.ends, voters, mean, spread, *tables, *marks
    rule, strides = (float(queries.lam), float(queries.sharpness)), (*mean.stride()[:3], *spread.stride()[:3])
    numbers = width, tiles, *rule, *queries.q.stride()[:2], *strides, tables[0].stride(0), heads
    spread_width = dim if size else spread.shape[3]
    shape = {
        "STD_KIND": std_kind,
        "NODES": mean.shape[2],
        "SIZE": size,
        "GROUP": heads // kv_heads,
        "DIM": dim,
        "DIM_PAD": padded(dim, 16),
        "WIDTH": spread_width,
        "WIDTH_PAD": padded(dim, 16) if std_kind == "vector" else padded(spread_width),
        "ROWS": row_tile(count, batch, heads // kv_heads, MOST_ROWS),
        "PAGES": pages,
        "CHUNKS": padded(chunks) if reduce == "softmax_sum" else 1,
        "SINKS": isinstance(marks[2], torch.Tensor),
        "SHARP": queries.sharpness != 1,
        # a program with one or two tiles has nothing to prefetch
        "num_stages": 2 if size else 3 if held else 1,
    }
    grid = (batch, kv_heads, chunks)
    lse = None
    if reduce == "softmax_sum":
        lse = torch.empty(count, heads, shape["CHUNKS"], dtype=torch.float32, device=device)
        _lse_kernel[grid](*inputs, lse, *numbers, **shape)
    _score_kernel[grid](*inputs, lse, *outputs, *numbers, REDUCE=reduce, **shape)
