"""A program scores a run of pages for all rows of a request: one product per tile of means, reduced over the rows.

The rows-by-pages matrix is never stored. `softmax_sum` needs each row's
normaliser first: another pass leaves the log-sum-exp of each row over each run
of pages, and the scoring pass puts those together.
"""

import torch
import triton
import triton.language as tl

from vllm_dlm.kernels.page_scores import naive
from vllm_dlm.kernels.triton_utils import dot, load_rows, padded, processors, row_offsets, row_tile

FORCED, LOWEST = tl.constexpr(naive.FORCED), tl.constexpr(naive.LOWEST)
#: pages of a tile, rows of a tile at most, and runs that a softmax's normaliser may have
PAGES, MOST_ROWS, MOST_CHUNKS = 64, 32, 32


@triton.jit
def _load_pages(
    mean, spread, table, position, there, h, stride_mean, stride_mean_head, stride_spread, stride_spread_head,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,
):  # fmt: skip
    """-> means [PAGES, DIM_PAD], spreads [PAGES, WIDTH_PAD], and which pages have none [PAGES]"""
    page = tl.load(table + position, mask=there, other=0).to(tl.int64)
    channel, part = tl.arange(0, DIM_PAD), tl.arange(0, WIDTH_PAD)
    means = tl.load(
        mean + page[:, None] * stride_mean + h * stride_mean_head + channel[None, :],
        mask=there[:, None] & (channel < DIM)[None, :], other=0.0,
    )  # fmt: skip
    spreads = tl.load(
        spread + page[:, None] * stride_spread + h * stride_spread_head + part[None, :],
        mask=there[:, None] & (part < WIDTH)[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    unknown = tl.abs(spreads) == float("inf")
    return means, tl.where(unknown, 0.0, spreads), tl.max(unknown.to(tl.int32), 1) > 0


@triton.jit
def _logits(rows, means, spreads, lam, STD_KIND: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """rows [R, DIM_PAD], means [PAGES, DIM_PAD], spreads [PAGES, WIDTH_PAD] -> [R, PAGES] float32, see __init__.py"""
    scale: tl.constexpr = DIM**-0.5
    exact = rows.to(tl.float32)
    logits = tl.zeros([rows.shape[0], means.shape[0]], tl.float32)
    if STD_KIND == "vector":
        # with lam inside the product: one accumulator for both
        weighted = (tl.abs(exact) * lam).to(means.dtype)
        logits = dot(weighted, tl.trans(spreads.to(means.dtype)), logits)
    logits = dot(rows.to(means.dtype), tl.trans(means), logits) * scale
    if STD_KIND == "diag2":
        channel, part = tl.arange(0, rows.shape[1]), tl.arange(0, spreads.shape[1])
        for group in tl.static_range(WIDTH):
            # as torch.tensor_split: the first DIM % WIDTH groups have one channel more
            size = DIM // WIDTH + (group < DIM % WIDTH)
            first = group * (DIM // WIDTH) + min(group, DIM % WIDTH)
            inside = (channel >= first) & (channel < first + size)
            energy = tl.sum(tl.where(inside[None, :], exact * exact, 0.0), 1)
            spread = tl.sum(tl.where((part == group)[None, :], spreads, 0.0), 1)
            logits += energy[:, None] * spread[None, :] * (lam / DIM)
    elif STD_KIND != "vector":
        length = tl.sqrt(tl.sum(exact * exact, 1))
        logits += length[:, None] * tl.sum(spreads, 1)[None, :] * (lam * scale)
    return logits


@triton.jit
def _normaliser(lse, offsets, there, CHUNKS: tl.constexpr):
    """Log-sum-exp of each run of pages [rows, CHUNKS] -> of the whole row [R]; infinite or not a number where a
    softmax has no sense"""
    chunk = tl.arange(0, CHUNKS)
    # as many runs as this program's launch has, which are those of the launch before
    exists = there[:, None] & (chunk < tl.num_programs(2))[None, :]
    parts = tl.load(lse + offsets[:, None] * CHUNKS + chunk[None, :], mask=exists, other=float("-inf"))
    highest = tl.max(parts, 1)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    return highest + tl.log(tl.sum(tl.exp(parts - highest[:, None]), 1))


@triton.jit
def _lse_kernel(
    q, q_starts, mean, spread, table, num_pages, forced_from, lse, width, tiles, sink_pages, lam,
    stride_q, stride_q_head, stride_mean, stride_mean_head, stride_spread, stride_spread_head, stride_table,
    heads,
    STD_KIND: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr, ROWS: tl.constexpr, PAGES: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """lse [Tq, H, CHUNKS]: log-sum-exp of each row over the pages of a run that compete for it"""
    b, h, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, count = tl.load(q_starts + b), tl.load(num_pages + b)
    rows, forced_at = (tl.load(q_starts + b + 1) - first) * GROUP, tl.load(forced_from + b)
    table += b.to(tl.int64) * stride_table
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        queries = load_rows(q, row_offsets(first, row, h, stride_q, stride_q_head, GROUP), row < rows, DIM, DIM_PAD)
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for tile in range(chunk * tiles, tl.minimum((chunk + 1) * tiles, tl.cdiv(width, PAGES))):
            position = tile * PAGES + tl.arange(0, PAGES)
            means, spreads, unknown = _load_pages(
                mean, spread, table, position, position < count, h, stride_mean, stride_mean_head, stride_spread,
                stride_spread_head, DIM, DIM_PAD, WIDTH, WIDTH_PAD,
            )  # fmt: skip
            logits = _logits(queries, means, spreads, lam, STD_KIND, WIDTH, DIM)
            compete = (position < count) & (position >= sink_pages) & (position < forced_at) & (unknown == 0)
            logits = tl.where(compete[None, :] & (logits == logits), logits, float("-inf"))
            higher = tl.maximum(highest, tl.max(logits, 1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(highest - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
            highest = higher
        value = tl.where(highest == float("-inf"), highest, highest + tl.log(total))
        tl.store(lse + row_offsets(first, row, h, heads, 1, GROUP) * CHUNKS + chunk, value, mask=row < rows)


@triton.jit
def _score_kernel(
    q, q_starts, mean, spread, table, num_pages, forced_from, lse, scores, width, tiles, sink_pages, lam,
    stride_q, stride_q_head, stride_mean, stride_mean_head, stride_spread, stride_spread_head, stride_table,
    heads,
    REDUCE: tl.constexpr, STD_KIND: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, ROWS: tl.constexpr, PAGES: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """scores [B, Hkv, width]"""
    b, h, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, count = tl.load(q_starts + b), tl.load(num_pages + b)
    rows, forced_at = (tl.load(q_starts + b + 1) - first) * GROUP, tl.load(forced_from + b)
    table += b.to(tl.int64) * stride_table
    scores += (b.to(tl.int64) * tl.num_programs(1) + h) * width
    for tile in range(chunk * tiles, tl.minimum((chunk + 1) * tiles, tl.cdiv(width, PAGES))):
        position = tile * PAGES + tl.arange(0, PAGES)
        means, spreads, unknown = _load_pages(
            mean, spread, table, position, position < count, h, stride_mean, stride_mean_head, stride_spread,
            stride_spread_head, DIM, DIM_PAD, WIDTH, WIDTH_PAD,
        )  # fmt: skip
        score = tl.full([PAGES], float("-inf") if REDUCE == "max" else 0.0, tl.float32)
        broken = tl.zeros([PAGES], tl.int32)
        for start in range(0, rows, ROWS):
            row = start + tl.arange(0, ROWS)
            there = row < rows
            queries = load_rows(q, row_offsets(first, row, h, stride_q, stride_q_head, GROUP), there, DIM, DIM_PAD)
            logits = _logits(queries, means, spreads, lam, STD_KIND, WIDTH, DIM)
            # a maximum passes over what is not a number: it is looked for by itself
            broken = tl.maximum(broken, tl.max((there[:, None] & (logits != logits)).to(tl.int32), 0))
            if REDUCE == "max":
                score = tl.maximum(score, tl.max(tl.where(there[:, None], logits, float("-inf")), 0))
            elif REDUCE == "mean":
                score += tl.sum(tl.where(there[:, None], logits, 0.0), 0) / rows
            else:
                norm = _normaliser(lse, row_offsets(first, row, h, heads, 1, GROUP), there, CHUNKS)
                sensible = there & (tl.abs(norm) < float("inf"))
                score += tl.sum(tl.where(sensible[:, None], tl.exp(logits - norm[:, None]), 0.0), 0)
        score = tl.where((broken > 0) | (score != score), LOWEST, score)
        score = tl.minimum(tl.maximum(score, LOWEST), FORCED / 10)
        forced = (position < sink_pages) | (position >= forced_at) | unknown
        score = tl.where(position < count, tl.where(forced, FORCED, score), float("-inf"))
        tl.store(scores + position, score, mask=position < width)


def _chunks(tiles: int, programs: int, most: int, device: torch.device) -> tuple[int, int]:
    """-> runs of pages and tiles of each: enough that all processors have work, whatever the contexts are"""
    chunks = min(max(2 * processors(device) // programs, 1), tiles, most)
    each = triton.cdiv(tiles, chunks)
    return triton.cdiv(tiles, each), each


def page_scores(q, q_starts, mean, spread, page_table, num_pages, forced_from, std_kind, sink_pages, lam, reduce):
    """See dispatch.py; mean [pages, Hkv, D], spread [pages, Hkv, W]"""
    (batch, width), (queries, heads, dim) = page_table.shape, q.shape
    kv_heads, group = mean.shape[1], heads // mean.shape[1]
    scores = torch.empty(batch, kv_heads, width, dtype=torch.float32, device=q.device)
    if not scores.numel():
        return scores
    # the spreads of every channel are more to hold than the means
    pages = min(PAGES, 32) if std_kind == "vector" else PAGES
    most = MOST_CHUNKS if reduce == "softmax_sum" else 1 << 15
    chunks, tiles = _chunks(triton.cdiv(width, pages), batch * kv_heads, most, q.device)
    inputs = (q, q_starts, mean, spread, page_table, num_pages, forced_from)
    numbers = (
        width, tiles, sink_pages, lam, *q.stride()[:2], *mean.stride()[:2], *spread.stride()[:2],
        page_table.stride(0), heads,
    )  # fmt: skip
    shape = {
        "STD_KIND": std_kind, "GROUP": group, "DIM": dim, "DIM_PAD": padded(dim, 16),
        "WIDTH": spread.shape[2], "WIDTH_PAD": padded(dim, 16) if std_kind == "vector" else spread.shape[2],
        "ROWS": row_tile(queries, batch, group, MOST_ROWS), "PAGES": pages,
        "CHUNKS": padded(chunks) if reduce == "softmax_sum" else 1,
    }  # fmt: skip
    grid = (batch, kv_heads, chunks)
    lse = None
    if reduce == "softmax_sum":
        lse = torch.empty(queries, heads, shape["CHUNKS"], dtype=torch.float32, device=q.device)
        _lse_kernel[grid](*inputs, lse, *numbers, **shape)
    _score_kernel[grid](*inputs, lse, scores, *numbers, REDUCE=reduce, **shape)
    return scores


def run_scores(q, mean, spread, std_kind, forced_from, known_from, sink_pages, lam, reduce):
    """See dispatch.py; the request's own pages are all there are, and nothing is fetched or copied to name them"""
    count, device = mean.shape[1], q.device
    if forced_from is None:
        forced_from = torch.full((1,), known_from, device=device)
    return page_scores(
        q, torch.arange(2, device=device) * len(q), mean.transpose(0, 1), spread.transpose(0, 1),
        torch.arange(count, device=device).unsqueeze(0), torch.full((1,), count, device=device), forced_from, std_kind,
        sink_pages, lam, reduce,
    )  # fmt: skip
