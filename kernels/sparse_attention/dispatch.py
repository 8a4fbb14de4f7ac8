"""Which implementation runs."""

import torch

from vllm_dlm.kernels.operators import operator
from vllm_dlm.kernels.sparse_attention import torch as plain

_sparse_attention = operator(
    "sparse_attention(Tensor q, Tensor q_starts, Tensor cache, Tensor page_table, Tensor chosen, Tensor kv_lens, "
    "int page_size, float scale, bool causal) -> Tensor",
    __package__,
    lambda q, *rest: q.new_empty(q.shape),
)


def sparse_attention(
    q: torch.Tensor,  # [Tq, H, D], the queries of request after request
    q_starts: torch.Tensor,  # [B + 1] where each request's queries start
    cache: torch.Tensor,  # [blocks, Hkv, block_size, 2 * D], keys before values
    page_table: torch.Tensor,  # [B, N] physical page of each logical one
    chosen: torch.Tensor,  # [B, Hkv, K] int32 logical pages, ascending, -1 at the end
    kv_lens: torch.Tensor,  # [B] keys of each request; its queries are the last of them if causal
    page_size: int,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    """-> [Tq, H, D]. Every query must see at least one key."""
    if q.is_cuda:
        return _sparse_attention(q, q_starts, cache, page_table, chosen, kv_lens, page_size, scale, causal)
    return plain.sparse_attention(q, q_starts, cache, page_table, chosen, kv_lens, page_size, scale, causal)
