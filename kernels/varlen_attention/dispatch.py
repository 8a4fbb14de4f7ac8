"""Dispatches to torch, the only fast path, on every device."""

from collections.abc import Sequence

import torch

from vllm_dlm.kernels.varlen_attention import torch as plain


def varlen_attention(
    q: torch.Tensor,  # [Tq, H, D]; sequence i owns `q_lens[i]` rows
    k: torch.Tensor,  # [Tk, Hkv, D]; and `kv_lens[i]` of these
    v: torch.Tensor,  # [Tk, Hkv, D]
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    scale: float,
) -> torch.Tensor:
    """-> [Tq, H, D]"""
    return plain.varlen_attention(q, k, v, q_lens, kv_lens, scale)
