"""Bidirectional attention over packed sequences of different lengths.

q [Tq, H, D], k and v [Tk, Hkv, D]; sequence i owns `q_lens[i]` rows of q and
`kv_lens[i]` rows of k and v, and each of its queries sees all of its keys.
"""

from collections.abc import Sequence

import torch

from vllm_dlm.kernels.varlen_attention.torch import varlen_attention as _sdpa


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_lens: Sequence[int], kv_lens: Sequence[int], scale: float
) -> torch.Tensor:
    """-> context [Tq, H, D]"""
    return _sdpa(q, k, v, q_lens, kv_lens, scale)
