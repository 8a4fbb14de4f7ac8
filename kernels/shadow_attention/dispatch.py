"""Dispatches to Triton on a GPU, with one launch for all canvases, and to torch elsewhere, canvas by canvas."""

import torch

from vllm_dlm.kernels.operators import operator
from vllm_dlm.kernels.shadow_attention import torch as plain

_shadow_attention = operator(
    "shadow_attention(Tensor q, Tensor q_starts, Tensor hidden, Tensor k, Tensor v, Tensor k_starts, Tensor cache, "
    "Tensor tables, Tensor kv_lens, float scale, int max_q) -> Tensor",
    __package__,
    lambda q, *rest: q.new_empty(q.shape),
)


def shadow_attention(
    q: torch.Tensor,  # [n, H, D], queries packed canvas by canvas
    q_starts: torch.Tensor,  # [C + 1] where each canvas's queries start
    hidden: torch.Tensor,  # [n] position of the canvas that each query must not attend to
    k: torch.Tensor,  # [T, Hkv, D] of the shadow rows
    v: torch.Tensor,  # [T, Hkv, D]
    k_starts: torch.Tensor,  # [C + 1] where each canvas's shadow rows start
    cache: torch.Tensor,  # [blocks, Hkv, block_size, 2 * D], keys before values
    tables: torch.Tensor,  # [C, N] blocks of each canvas
    kv_lens: torch.Tensor,  # [C] number of positions of each canvas
    scale: float,
    max_q: int,  # upper bound on queries per canvas
) -> torch.Tensor:
    """-> [n, H, D]"""
    if q.is_cuda:
        return _shadow_attention(q, q_starts, hidden, k, v, k_starts, cache, tables, kv_lens, scale, max_q)
    return plain.shadow_attention(q, q_starts, hidden, k, v, k_starts, cache, tables, kv_lens, scale)
