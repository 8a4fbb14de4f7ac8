"""Loads the statistics of one tile of pages: stored ones, or ones computed from the keys on the fly."""

import triton
import triton.language as tl


@triton.jit
def load_pages(
    mean, spread, table, runs, position, count, width, stride_mean, stride_mean_head, stride_mean_node, stride_spread,
    stride_spread_head, stride_spread_node, stride_table,
    STD_KIND: tl.constexpr, NODES: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,
):  # fmt: skip
    """-> for pages `position` [PAGES] of this program's request and head: means [PAGES, DIM_PAD], spreads
    [PAGES, WIDTH_PAD], and [PAGES] each: which lack statistics, which exist, and their names. A name is the page, or
    with SIZE > 0 the index of the half run."""
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    table += b * stride_table
    if SIZE > 0:
        run = tl.load(
            runs + (b * tl.num_programs(1) + h) * (width // 2) + position // 2, mask=position < width, other=-1
        )
        there = run >= 0
        name = tl.where(there, 2 * run + position % 2, -1)
        means, spreads = _of_keys(
            mean,
            table,
            name,
            there,
            h,
            stride_mean,
            stride_mean_head,
            stride_mean_node,
            STD_KIND,
            NODES,
            SIZE,
            DIM,
            DIM_PAD,
        )
        unknown = tl.zeros_like(position)
        if STD_KIND == "vector":
            infinite = tl.abs(spreads) == float("inf")
            spreads, unknown = tl.where(infinite, 0.0, spreads), tl.max(infinite.to(tl.int32), 1)
    else:
        name, there = position, position < count
        place = tl.load(table + position // NODES, mask=there, other=0).to(tl.int64)
        channel = tl.arange(0, DIM_PAD)
        offset = place * stride_mean + h * stride_mean_head + position % NODES * stride_mean_node
        means = tl.load(
            mean + offset[:, None] + channel[None, :], mask=there[:, None] & (channel < DIM)[None, :], other=0.0
        )
        if STD_KIND == "none":
            spreads, unknown = means, tl.zeros_like(position)
        else:
            part = tl.arange(0, WIDTH_PAD)
            offset = place * stride_spread + h * stride_spread_head + position % NODES * stride_spread_node
            spreads = tl.load(
                spread + offset[:, None] + part[None, :], mask=there[:, None] & (part < WIDTH)[None, :], other=0.0
            ).to(tl.float32)
            infinite = tl.abs(spreads) == float("inf")
            spreads, unknown = tl.where(infinite, 0.0, spreads), tl.max(infinite.to(tl.int32), 1)
    return means, spreads, unknown, there, name


@triton.jit
def _of_keys(
    cache,
    table,
    name,
    there,
    h,
    stride_block,
    stride_head,
    stride_key,
    STD_KIND: tl.constexpr,
    NODES: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """Mean and standard deviation [R, DIM_PAD] of the runs `name` [R] of SIZE keys each. NODES: keys per block."""
    channel = tl.arange(0, DIM_PAD)
    first = name * SIZE
    block = tl.load(table + first // NODES, mask=there, other=0).to(tl.int64)
    keys = cache + (block * stride_block + h * stride_head + first % NODES * stride_key)[:, None] + channel[None, :]
    mask = there[:, None] & (channel < DIM)[None, :]
    total = tl.load(keys, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(1, SIZE):
        total += tl.load(keys + i * stride_key, mask=mask, other=0.0).to(tl.float32)
    mean = total / SIZE
    spread = tl.zeros_like(mean)
    if STD_KIND == "vector" and SIZE > 1:
        for i in tl.static_range(SIZE):
            apart = tl.load(keys + i * stride_key, mask=mask, other=0.0).to(tl.float32) - mean
            spread += apart * apart
        spread = tl.sqrt(spread / SIZE)
    return mean.to(cache.dtype.element_ty), spread
