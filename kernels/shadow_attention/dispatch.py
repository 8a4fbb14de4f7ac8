"""Which implementation runs: torch's, one canvas after the other, or on a GPU Triton's for all of them."""

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
    q: torch.Tensor,  # [n, H, D], the queries of canvas after canvas
    q_starts: torch.Tensor,  # [C + 1] where each canvas's queries start
    hidden: torch.Tensor,  # [n] the position of its canvas that each does not see
    k: torch.Tensor,  # [T, Hkv, D] of the shadow rows
    v: torch.Tensor,  # [T, Hkv, D]
    k_starts: torch.Tensor,  # [C + 1] where each canvas's shadow rows start
    cache: torch.Tensor,  # [blocks, Hkv, block_size, 2 * D], keys before values
    tables: torch.Tensor,  # [C, N] blocks of each canvas
    kv_lens: torch.Tensor,  # [C] how many positions each canvas has
    scale: float,
    max_q: int,  # no canvas has more queries
) -> torch.Tensor:
    """-> [n, H, D]"""
    if q.is_cuda:
        return _shadow_attention(q, q_starts, hidden, k, v, k_starts, cache, tables, kv_lens, scale, max_q)
    return plain.shadow_attention(q, q_starts, hidden, k, v, k_starts, cache, tables, kv_lens, scale)
