"""Which implementation runs: torch's on every device for keys that lie side by side."""

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
    columns: torch.Tensor,  # [Hkv, S, D] the keys whose values moved
    delta: torch.Tensor,  # [S, Hkv, D]
    scale: float,
) -> torch.Tensor:
    """-> [L, H, D]"""
    return plain.delta_attention(query, key, columns, delta, scale)


def delta_over_pages(
    q: torch.Tensor,  # [n, H, D], the queries of canvas after canvas
    q_starts: torch.Tensor,  # [C + 1] where each canvas's queries start; what follows the last is left alone
    cache: torch.Tensor,  # [blocks, Hkv, block_size, 2 * D], keys before values
    tables: torch.Tensor,  # [C, N] blocks of each canvas
    kv_lens: torch.Tensor,  # [C]
    place: torch.Tensor,  # [C, L] where in `moved` each key's move stands, below 0 for keys whose values are as before
    moved: torch.Tensor,  # [S, Hkv, D]
    scale: float,
    max_q: int,  # no canvas has more queries
    max_kv: int,  # nor more keys
) -> torch.Tensor:
    """-> [n, H, D]"""
    if q.is_cuda:
        return _delta_over_pages(q, q_starts, cache, tables, kv_lens, place, moved, scale, max_q, max_kv)
    return plain.delta_over_pages(q, q_starts, cache, tables, kv_lens, place, moved, scale)
