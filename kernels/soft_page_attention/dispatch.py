"""Dispatches to Triton on a GPU and to torch elsewhere."""

import torch

from vllm_dlm.kernels.soft_page_attention import torch as plain
from vllm_dlm.kernels.soft_page_attention.gate import Gate
from vllm_dlm.kernels.soft_page_attention.measure import measure

__all__ = ["measure", "soft_page_attention"]


def soft_page_attention(
    q: torch.Tensor,  # [B, H, T, D], queries of the last T positions of each sequence
    k: torch.Tensor,  # [B, Hkv, N, D]
    v: torch.Tensor,  # [B, Hkv, N, D]
    gate: Gate,
    scale: float,
    prompt_len: int = 0,  # number of first tokens that serving would prefill
) -> torch.Tensor:
    """-> [B, H, T, D]. Pages are counted from each sequence's first token."""
    device = q.device.type
    if torch.is_autocast_enabled(device):
        # Cast operands as autocast does for a fused attention. The products below choose their own precision.
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    with torch.autocast(device, enabled=False):
        if q.is_cuda:
            from vllm_dlm.kernels.soft_page_attention import triton

            return triton.soft_page_attention(q, k, v, gate, scale, prompt_len)
        return plain.soft_page_attention(q, k, v, gate, scale, prompt_len)
