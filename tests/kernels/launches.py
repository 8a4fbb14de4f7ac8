"""Calls of every kernel as on a GPU, with tensors that claim to be on one."""

from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.pages import scored
from vllm_dlm.kernels.add_norm import add_norm
from vllm_dlm.kernels.block_rows import read_rows, read_values, write_rows
from vllm_dlm.kernels.delta_attention import delta_over_pages
from vllm_dlm.kernels.haar_pyramid import PageStatistics, store_statistics
from vllm_dlm.kernels.head_statistics import head_statistics
from vllm_dlm.kernels.lowest_rows import lowest_rows
from vllm_dlm.kernels.operators import LAUNCHERS, NAMESPACE
from vllm_dlm.kernels.page_scores import ScoringQueries, half_scores, page_scores
from vllm_dlm.kernels.rotary_write import rotary_write
from vllm_dlm.kernels.row_cosine import row_cosine, row_products
from vllm_dlm.kernels.shadow_attention import shadow_attention
from vllm_dlm.kernels.sparse_attention import sparse_attention, sparse_delta
from vllm_dlm.kernels.top_pages import store_top_pages, top_pages, unless_alike

BF16, F32 = torch.bfloat16, torch.float32


class Launching(TorchDispatchMode):
    """Mode in which this package's operators run their GPU launchers."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == NAMESPACE:
            return LAUNCHERS[operator.name().partition("::")[2].partition(".")[0]](*args)
        return operator(*args, **(kwargs or {}))


def ints(*shape, dtype=torch.int32):
    return torch.empty(shape, dtype=dtype)


def longs(*shape):
    return ints(*shape, dtype=torch.int64)


def halves(*shape):
    return torch.empty(shape, dtype=BF16)


def cache(dim=128, kv_heads=8, dtype=BF16, blocks=64, block_size=64):
    return torch.empty(blocks, kv_heads, block_size, 2 * dim, dtype=dtype)


def statistics(std_kind, **shape):
    pages = cache(**shape)
    return partial(store_statistics, pages, ints(16), PageStatistics.empty(pages, pages.shape[2], std_kind))


def scores(std_kind, reduce, queries=4):
    described = PageStatistics.empty(cache(), 64, std_kind)
    q = halves(queries, 32, 128)
    return partial(scored, page_scores, q, ints(5), described, ints(4, 2048), ints(4), ints(4), 1, 0.5, reduce)


def scores_of_canvases(std_kind, reduce="softmax_sum"):
    """Scores of canvases, which store summaries among their keys and values, with some voters."""
    pages, q = cache(), halves(4 * 32, 32, 128)
    described = PageStatistics(*pages.split(128, 3), 64, std_kind)
    return partial(
        scored,
        page_scores,
        q,
        ints(4),
        described,
        ints(4, 32),
        ints(4),
        ints(4),
        ints(4),
        0.5,
        reduce,
        ints(4),
        torch.empty(4 * 32, dtype=torch.bool),
        2.0,
    )


def scores_of_halves(size, lam, reduce="softmax_sum"):
    q = halves(4 * 32, 32, 128)
    queries = ScoringQueries(q, ints(4), ints(4), lam, reduce, torch.empty(4 * 32, dtype=torch.bool), 2.0)
    return partial(half_scores, queries, cache(), ints(4, 256), ints(4, 8, 1640), size, ints(4), ints(4))


def attention_of_canvases(page_size, kept, moved=False, **shape):
    pages = cache(**shape)
    q = torch.empty(4 * 32, 32, pages.shape[3] // 2, dtype=pages.dtype)
    held = ints(9, 8, kept + 100).narrow(2, 0, kept)
    where = q, ints(4), ints(4), pages, ints(4, 256), held, ints(4), page_size, 0.1
    read = 64 // page_size, q.new_empty(q.shape), longs(4), ints(4), 256 // page_size
    if moved:
        return partial(sparse_delta, *where, q.new_empty(64, 8, q.shape[2]), ints(4, 16384), *read)
    q, starts, ends, *rest = where
    return partial(sparse_attention, q, starts, *rest, False, ends, *read)


def attention(queries, causal=True, page_size=64, kept=32, group=4, **shape):
    pages = cache(**shape)
    q = torch.empty(4 * queries, 8 * group, pages.shape[3] // 2, dtype=pages.dtype)
    return partial(
        sparse_attention, q, ints(5), pages, ints(4, 2048), ints(4, 8, kept), ints(4), page_size, 0.1, causal
    )


def rotary(dim=128, dtype=BF16, table=F32, index=None):
    """q, k and v are views of one product."""
    pages = cache(dim, dtype=dtype)
    q, k, v = torch.empty(96, 48, dim, dtype=dtype).split((32, 8, 8), 1)
    return partial(
        rotary_write, q, k, v, torch.empty(4096, dim, dtype=table), ints(128), ints(128), ints(128), pages, index
    )


def values_alone():
    v = halves(96, 32, 128)
    return partial(
        rotary_write, None, None, v, torch.empty(4096, 128), ints(96), ints(96), ints(96), cache(kv_heads=32), None
    )


def lowest(rows):
    return partial(lowest_rows, torch.empty(rows), ints(rows, dtype=torch.bool), ints(5), ints(5), 512)


def head(dtype, entropy):
    marks = ints(64, dtype=torch.bool)
    return partial(head_statistics, torch.empty(64, 126464, dtype=dtype), 126336, 3, 5, marks, marks, entropy)


def delta(rows, group=4, **shape):
    pages = cache(**shape)
    dim, dtype = pages.shape[3] // 2, pages.dtype
    q, moved = torch.empty(2 * rows, 8 * group, dim, dtype=dtype), torch.empty(128, 8, dim, dtype=dtype)
    return partial(delta_over_pages, q, ints(3), pages, ints(2, 32), ints(2), ints(2, 2048), moved, 0.1, rows, 2048)


def shadow(rows, group=4, **shape):
    pages = cache(**shape)
    dim, dtype = pages.shape[3] // 2, pages.dtype
    q, k, v = (torch.empty(2 * rows, heads, dim, dtype=dtype) for heads in (8 * group, 8, 8))
    return partial(shadow_attention, q, ints(3), longs(2 * rows), k, v, ints(3), pages, ints(2, 32), ints(2), 0.1, rows)


#: kernel calls, with functions that build their inputs
CASES = {
    "statistics": lambda: statistics("l2"),
    "scores": lambda: scores("l2", "max"),
    "scores of many queries": lambda: scores("l2", "max", 4 * 32),
    "scores by channel": lambda: scores("vector", "mean", 4 * 32),
    "normalised scores": lambda: scores("diag2", "softmax_sum"),
    "scores of canvases": lambda: scores_of_canvases("none"),
    "scores of pairs": lambda: scores_of_halves(2, 0.0),
    "scores of keys": lambda: scores_of_halves(1, 0.5, "max"),
    "scores of eights": lambda: scores_of_halves(8, 0.0, "mean"),
    "top of canvases": lambda: partial(top_pages, torch.empty(4, 8, 512), 32, ints(4), ints(4, 8, 512)),
    "top of canvases that hold": lambda: partial(
        store_top_pages,
        ints(9, 8, 700).narrow(2, 100, 600),
        longs(4),
        torch.empty(4, 8, 512),
        32,
        ints(4),
        ints(4, 8, 512),
    ),
    "what two choices share": lambda: partial(
        unless_alike, ints(4, 8, 2458), ints(9, 8, 2500), longs(4), ints(4, dtype=torch.bool), 0.9
    ),
    "attention of canvases": lambda: attention_of_canvases(1, 2700),
    "moved values": lambda: attention_of_canvases(2, 1400, moved=True),
    "sum and norm": lambda: partial(add_norm, halves(96, 4096), halves(96, 4096), halves(4096), 1e-5),
    "top pages": lambda: partial(top_pages, torch.empty(4, 8, 512), 32),
    "top pages of long rows": lambda: partial(top_pages, torch.empty(4, 8, 16384), 32),
    "attention": lambda: attention(1),
    "attention of a block": lambda: attention(32, causal=False),
    "attention over single keys": lambda: attention(8, page_size=1, kept=2048, group=1),
    "rotary and write": rotary,
    "cosine": lambda: partial(row_cosine, halves(96, 4096), halves(96, 3, 4096).select(1, 0)),
    "read rows": lambda: partial(read_rows, cache(), 4096, ints(96), ints(96), None),
    "read values": lambda: partial(read_values, cache(), ints(128), ints(128), ints(96)),
    "head": lambda: head(F32, True),
    "delta": lambda: delta(512),
    "shadow": lambda: shadow(128, group=1),
    "shadow of shared heads in small blocks": lambda: shadow(32, block_size=16),
    "lowest rows": lambda: lowest(1152),
}

#: less common calls, or calls similar to those above; only `make test-all` compiles them
RARER = {
    "statistics of large pages": lambda: statistics("diag2", block_size=128, dim=256),
    "scores of canvases by channel": lambda: scores_of_canvases("vector"),
    "scores of pairs by channel": lambda: scores_of_halves(2, 0.5),
    "moved values in float32": lambda: attention_of_canvases(2, 1400, moved=True, dtype=F32),
    "attention of wide heads": lambda: attention(32, dim=256),
    "attention in float32": lambda: attention(32, dtype=F32),
    "delta of few rows": lambda: delta(32, block_size=16),
    "rotary in half precision": lambda: rotary(table=BF16, index=ints(96, dtype=torch.int64)),
    "rotary of narrow heads in float32": lambda: rotary(dim=80, dtype=F32),
    "values alone": values_alone,
    "delta of wide heads": lambda: delta(128, dim=256),
    "delta in float32": lambda: delta(64, dtype=F32),
    "shadow of wide heads": lambda: shadow(128, dim=256),
    "shadow in float32": lambda: shadow(64, dtype=F32),
    "products": lambda: partial(row_products, torch.empty(96, 1024), torch.empty(96, 1024)),
    "write rows": lambda: partial(write_rows, cache(), ints(128), ints(128), halves(96, 4096), ints(96)),
    "head without entropy": lambda: head(BF16, False),
    "lowest rows of long canvases": lambda: lowest(16384),
}
