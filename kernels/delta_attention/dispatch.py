"""Dispatches delta_attention to torch on every device, delta_over_pages to Triton on a GPU and to torch elsewhere."""

import torch

from vllm_dlm.kernels.delta_attention import torch as plain
from vllm_dlm.kernels.operators import operator

_delta_over_pages = operator(
    "delta_over_pages(Tensor q, Tensor q_starts, Tensor cache, Tensor tables, Tensor kv_lens, Tensor place, "
    "Tensor moved, float scale, int max_q, int max_kv) -> Tensor",
    __package__,
    lambda q, *rest: q.new_empty(q.shape),
)


def delta_attention(
    query: torch.Tensor,  # [L, H, D]
    key: torch.Tensor,  # [Hkv, N, D]
    columns: torch.Tensor,  # [Hkv, S, D] keys whose values changed
    delta: torch.Tensor,  # [S, Hkv, D] by how much each of those values changed
    scale: float,
) -> torch.Tensor:
    """-> [L, H, D]"""
    return plain.delta_attention(query, key, columns, delta, scale)


def delta_over_pages(
    q: torch.Tensor,  # [n, H, D], queries packed canvas by canvas
    q_starts: torch.Tensor,  # [C + 1] where each canvas's queries start; rows after the last canvas are not computed
    cache: torch.Tensor,  # [blocks, Hkv, block_size, 2 * D], keys before values
    tables: torch.Tensor,  # [C, N] blocks of each canvas
    kv_lens: torch.Tensor,  # [C]
    place: torch.Tensor,  # [C, L] row of `moved` for each key, below 0 for keys whose values did not change
    moved: torch.Tensor,  # [S, Hkv, D] by how much values changed
    scale: float,
    max_q: int,  # upper bound on queries per canvas
    max_kv: int,  # upper bound on keys per canvas
) -> torch.Tensor:
    """-> [n, H, D]"""
    if q.is_cuda:
        return _delta_over_pages(q, q_starts, cache, tables, kv_lens, place, moved, scale, max_q, max_kv)
    return plain.delta_over_pages(q, q_starts, cache, tables, kv_lens, place, moved, scale)
