"""The pyramid in registers: each program reads the keys of one page and head once and builds the tree of runs upwards.

The tree is unrolled at compile time. A node is a row of channels spread over
the threads, and its children are two such rows. The kernel is only loads and
arithmetic, so all loads can be issued before the first addition.
"""

import triton
import triton.language as tl

from vllm_dlm.kernels.triton_utils import padded


@triton.jit
def _node(keys, stride_key, FIRST: tl.constexpr, LEVEL: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """-> mean and variance, [DIM_PAD] float32 each, of the 2^LEVEL keys from FIRST on"""
    channel = tl.arange(0, DIM_PAD)
    if LEVEL == 0:
        mean = tl.load(keys + FIRST * stride_key + channel, mask=channel < DIM, other=0.0).to(tl.float32)
        variance = tl.zeros_like(mean)
    else:
        even, within_even = _node(keys, stride_key, FIRST, LEVEL - 1, DIM, DIM_PAD)
        odd, within_odd = _node(keys, stride_key, FIRST + (1 << (LEVEL - 1)), LEVEL - 1, DIM, DIM_PAD)
        mean = (even + odd) * 0.5
        # variance = mean variance of the children + square of half the distance between their means
        apart = (even - odd) * 0.5
        variance = apart * apart + (within_even + within_odd) * 0.5
    return mean, variance


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
    h = tl.program_id(1).to(tl.int64)
    keys = cache + page // PER_BLOCK * stride_block + h * stride_head + page % PER_BLOCK * PAGE * stride_key
    channel = tl.arange(0, DIM_PAD)
    place = (page * tl.num_programs(1) + tl.program_id(1)) * (PAGE >> LEVEL)
    for first in tl.static_range(0, PAGE, 1 << LEVEL):
        mean, variance = _node(keys, stride_key, first, LEVEL, DIM, DIM_PAD)
        tl.store(means + place * DIM + channel, mean.to(means.dtype.element_ty), mask=channel < DIM)
        _store_spread(spread + place * WIDTH, variance, STD_KIND, WIDTH, DIM, DIM_PAD)
        place += 1


def store_statistics(cache, page_ids, mean, spread, page_size, std_kind):
    """See dispatch.py"""
    nodes, width = spread.shape[2:]
    dim = cache.shape[3] // 2
    if len(page_ids):
        _statistics_kernel[len(page_ids), cache.shape[1]](
            cache,
            page_ids,
            mean,
            spread,
            *cache.stride()[:3],
            PER_BLOCK=cache.shape[2] // page_size,
            PAGE=page_size,
            DIM=dim,
            DIM_PAD=padded(dim),
            LEVEL=(page_size // nodes).bit_length() - 1,
            WIDTH=width,
            STD_KIND=std_kind,
            num_warps=max(padded(dim) // 64, 1),  # few channels per warp, so that registers do not spill
        )
