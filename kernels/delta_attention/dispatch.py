"""Which implementation runs: torch's on every device."""

import torch

from vllm_dlm.kernels.delta_attention import torch as plain


def delta_attention(
    query: torch.Tensor,  # [L, H, D]
    key: torch.Tensor,  # [Hkv, N, D]
    columns: torch.Tensor,  # [Hkv, S, D] the keys whose values moved
    delta: torch.Tensor,  # [S, Hkv, D]
    scale: float,
) -> torch.Tensor:
    """-> [L, H, D]"""
    return plain.delta_attention(query, key, columns, delta, scale)
