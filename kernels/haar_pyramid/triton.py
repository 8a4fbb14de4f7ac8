"""The pyramid in registers: each program reads the keys of one page and head once and builds the tree of runs upwards.

The tree is unrolled at compile time. A node is a row of channels spread over
the threads, and its children are two such rows. The kernel is only loads and
arithmetic, so all loads can be issued before the first addition.
"""

import torch
import triton
import triton.language as tl

from vllm_dlm.kernels.triton_utils import padded


@triton.jit
def _page_keys(cache, page, stride_block, stride_head, stride_key, PER_BLOCK: tl.constexpr, PAGE: tl.constexpr):
    """Pointer to the first key of `page` for this program's head"""
    h = tl.program_id(1).to(tl.int64)
    return cache + page // PER_BLOCK * stride_block + h * stride_head + page % PER_BLOCK * PAGE * stride_key


@triton.jit
def _node(
    keys,
    stride_key,
    means,
    variances,
    root,
    FIRST: tl.constexpr,
    LEVEL: tl.constexpr,
    TOP: tl.constexpr,
    WANTED: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """-> mean and variance, [DIM_PAD] float32 each, of the 2^LEVEL keys from FIRST on. Nodes of the levels whose bit is
    set in WANTED are also stored. FIRST counts within node `root` of level TOP. A page's nodes are stored level by
    level, lowest first."""
    channel = tl.arange(0, DIM_PAD)
    if LEVEL == 0:
        mean = tl.load(keys + FIRST * stride_key + channel, mask=channel < DIM, other=0.0).to(tl.float32)
        variance = tl.zeros_like(mean)
    else:
        even, within_even = _node(
            keys, stride_key, means, variances, root, FIRST, LEVEL - 1, TOP, WANTED, PAGE, DIM, DIM_PAD
        )
        odd, within_odd = _node(
            keys,
            stride_key,
            means,
            variances,
            root,
            FIRST + (1 << (LEVEL - 1)),
            LEVEL - 1,
            TOP,
            WANTED,
            PAGE,
            DIM,
            DIM_PAD,
        )
        mean = (even + odd) * 0.5
        # variance = mean variance of the children + square of half the distance between their means
        apart = (even - odd) * 0.5
        variance = apart * apart + (within_even + within_odd) * 0.5
    if (WANTED >> LEVEL) & 1:
        place = (root << (TOP - LEVEL)) + (FIRST >> LEVEL)
        for lower in tl.static_range(LEVEL):
            if (WANTED >> lower) & 1:
                place += PAGE >> lower
        tl.store(means + place * DIM + channel, mean, mask=channel < DIM)
        tl.store(variances + place * DIM + channel, variance, mask=channel < DIM)
    return mean, variance


@triton.jit(do_not_specialize_on_alignment=["page_ids"])
def _pyramid_kernel(
    cache,
    page_ids,
    means,
    variances,
    stride_block,
    stride_head,
    stride_key,
    nodes,
    PER_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TOP: tl.constexpr,
    WANTED: tl.constexpr,
):
    """means and variances [n, Hkv, nodes, DIM]"""
    i = tl.program_id(0).to(tl.int64)
    page = tl.load(page_ids + i).to(tl.int64)
    if page < 0:
        return
    keys = _page_keys(cache, page, stride_block, stride_head, stride_key, PER_BLOCK, PAGE)
    root = tl.program_id(2)
    keys += (root << TOP) * stride_key
    start = (i * tl.num_programs(1) + tl.program_id(1)) * nodes * DIM
    _node(keys, stride_key, means + start, variances + start, root, 0, TOP, TOP, WANTED, PAGE, DIM, DIM_PAD)


@triton.jit
def _store_spread(
    spread, variance, STD_KIND: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr
):
    """Stores a node's spread [WIDTH], computed from variance [DIM_PAD], which is zero beyond DIM"""
    channel = tl.arange(0, DIM_PAD)
    if STD_KIND == "vector":
        tl.store(spread + channel, tl.sqrt(variance), mask=channel < DIM)
    elif STD_KIND == "diag2":
        for group in tl.static_range(WIDTH):
            # like torch.tensor_split: the first DIM % WIDTH groups have one extra channel
            size = DIM // WIDTH + (group < DIM % WIDTH)
            first = group * (DIM // WIDTH) + min(group, DIM % WIDTH)
            inside = (channel >= first) & (channel < first + size)
            tl.store(spread + group, tl.sum(tl.where(inside, variance, 0.0), 0) / size)
    else:
        tl.store(spread, tl.sqrt(tl.sum(variance, 0) / (1 if STD_KIND == "l2" else DIM)))


@triton.jit(do_not_specialize_on_alignment=["page_ids"])
def _statistics_kernel(
    cache,
    page_ids,
    means,
    spread,
    stride_block,
    stride_head,
    stride_key,
    PER_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    LEVEL: tl.constexpr,
    WIDTH: tl.constexpr,
    STD_KIND: tl.constexpr,
):
    """Stores means [pages, Hkv, n, DIM] and spread [pages, Hkv, n, WIDTH] of the nodes at LEVEL"""
    page = tl.load(page_ids + tl.program_id(0)).to(tl.int64)
    if page < 0:
        return
    keys = _page_keys(cache, page, stride_block, stride_head, stride_key, PER_BLOCK, PAGE)
    channel = tl.arange(0, DIM_PAD)
    place = (page * tl.num_programs(1) + tl.program_id(1)) * (PAGE >> LEVEL)
    for first in tl.static_range(0, PAGE, 1 << LEVEL):
        mean, variance = _node(keys, stride_key, means, means, 0, first, LEVEL, LEVEL, 0, PAGE, DIM, DIM_PAD)
        tl.store(means + place * DIM + channel, mean.to(means.dtype.element_ty), mask=channel < DIM)
        _store_spread(spread + place * WIDTH, variance, STD_KIND, WIDTH, DIM, DIM_PAD)
        place += 1


def _layout(cache, page_size, channels):
    """Cache layout arguments of both kernels. `channels`: channels per warp, chosen so that registers do not spill."""
    dim = cache.shape[3] // 2
    return {
        "PER_BLOCK": cache.shape[2] // page_size,
        "PAGE": page_size,
        "DIM": dim,
        "DIM_PAD": padded(dim),
        "num_warps": max(padded(dim) // channels, 1),
    }


def haar_pyramid(cache, page_ids, page_size, levels):
    """`levels` must ascend. The nodes of a page are concatenated, lowest level first. Outputs for ids below 0 are
    undefined."""
    count, kv_heads, dim = len(page_ids), cache.shape[1], cache.shape[3] // 2
    sizes = [page_size >> level for level in levels]
    means = torch.empty(count, kv_heads, sum(sizes), dim, dtype=torch.float32, device=cache.device)
    variances = torch.empty_like(means)
    if count:
        _pyramid_kernel[count, kv_heads, sizes[-1]](
            cache,
            page_ids,
            means,
            variances,
            *cache.stride()[:3],
            sum(sizes),
            TOP=levels[-1],
            WANTED=sum(1 << level for level in levels),
            **_layout(cache, page_size, 128),
        )
    return means, variances


def store_statistics(cache, page_ids, mean, spread, page_size, std_kind):
    """See dispatch.py"""
    nodes, width = spread.shape[2:]
    if len(page_ids):
        _statistics_kernel[len(page_ids), cache.shape[1]](
            cache,
            page_ids,
            mean,
            spread,
            *cache.stride()[:3],
            LEVEL=(page_size // nodes).bit_length() - 1,
            WIDTH=width,
            STD_KIND=std_kind,
            **_layout(cache, page_size, 64),
        )
