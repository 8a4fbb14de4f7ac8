"""Dispatches to Triton on a GPU and to torch elsewhere."""

import torch

from vllm_dlm.kernels.operators import operator
from vllm_dlm.kernels.sparse_attention import torch as plain

_ARGUMENTS = (
    "Tensor q, Tensor q_starts, Tensor q_ends, Tensor cache, Tensor page_table, Tensor chosen, Tensor kv_lens, "
    "int page_size, float scale, bool causal, int table_pages, Tensor? moved, Tensor? places, Tensor? rows, "
    "Tensor? tails, int tail"
)
_sparse_attention = operator(
    f"sparse_attention({_ARGUMENTS}) -> Tensor", __package__, lambda q, *rest: q.new_empty(q.shape)
)
_sparse_attention_into = operator(
    f"sparse_attention_into(Tensor(a!) out, {_ARGUMENTS}) -> ()", __package__, lambda *arguments: None
)


def sparse_attention(
    q: torch.Tensor,  # [Tq, H, D], queries packed request by request
    q_starts: torch.Tensor,  # [B + 1] where each request's queries start; with q_ends [B], ascending
    cache: torch.Tensor,  # [blocks, Hkv, block_size, 2 * D], keys before values
    page_table: torch.Tensor,  # [B, N] physical page of each logical page, or of each `table_pages` logical pages
    chosen: torch.Tensor,  # [B, Hkv, K] int32 logical pages, ascending, padded with -1; see `rows` and `tails`
    kv_lens: torch.Tensor,  # [B] number of keys; if causal, a request's queries are its last positions
    page_size: int,
    scale: float,
    causal: bool,
    q_ends: torch.Tensor | None = None,  # [B] where each request's queries end; None: where the next one's start
    table_pages: int = 1,  # n consecutive pages per table entry: page p is table[p // n] * n + p % n
    out: torch.Tensor | None = None,  # [Tq, H, D] output buffer; rows of queries that belong to no request are kept
    rows: torch.Tensor | None = None,  # [B] int64 row of `chosen` of each request; None: row b
    tails: torch.Tensor | None = None,  # [B] int32: all pages from here to the last one are read, too
    tail: int = 0,  # upper bound on the number of those pages
) -> torch.Tensor:
    """-> [Tq, H, D]. Every query must see at least one key."""
    arguments = (cache, page_table, chosen, kv_lens, page_size, scale, causal)
    if q.is_cuda:
        ends = q_starts.narrow(0, 1, len(page_table)) if q_ends is None else q_ends
        return _launched(out, q, q_starts, ends, *arguments, table_pages, None, None, rows, tails, tail)
    return plain.sparse_attention(q, q_starts, *arguments, q_ends, table_pages, out, rows, tails, tail)


def _launched(out: torch.Tensor | None, *arguments) -> torch.Tensor:
    if out is None:
        return _sparse_attention(*arguments)
    _sparse_attention_into(out, *arguments)
    return out


def sparse_delta(
    q: torch.Tensor,  # [Tq, H, D]
    q_starts: torch.Tensor,  # [B] where each request's queries start, ascending
    q_ends: torch.Tensor,  # [B] where they end
    cache: torch.Tensor,  # [blocks, Hkv, block_size, 2 * D]
    page_table: torch.Tensor,  # [B, N] physical place of each `table_pages` logical pages
    chosen: torch.Tensor,  # [B, Hkv, K] int32 logical pages, ascending, padded with -1; see `rows` and `tails`
    kv_lens: torch.Tensor,  # [B]
    page_size: int,
    scale: float,
    moved: torch.Tensor,  # [S, Hkv, D] by how much values changed
    places: torch.Tensor,  # [B, positions] int32: row of `moved` of each position, -1: unchanged
    table_pages: int = 1,
    out: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    tails: torch.Tensor | None = None,
    tail: int = 0,
) -> torch.Tensor:
    """Change of sparse_attention caused by changed values: the same attention weights, applied to the changes
    -> [Tq, H, D]"""
    arguments = (q, q_starts, q_ends, cache, page_table, chosen, kv_lens, page_size, scale)
    if q.is_cuda:
        return _launched(out, *arguments, False, table_pages, moved, places, rows, tails, tail)
    return plain.sparse_delta(*arguments, moved, places, table_pages, out, rows, tails, tail)
