"""Dispatches to torch, the only fast path, on every device."""

from collections.abc import Sequence

import torch

from vllm_dlm.kernels.paged_attention import torch as plain


def paged_attention(
    q: torch.Tensor,  # [Tq, H, D], queries packed sequence by sequence
    cache: torch.Tensor,  # [blocks, Hkv, block_size, 2 * D], keys before values
    tables: Sequence[torch.Tensor],  # each sequence's blocks, in order
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    scale: float,
) -> torch.Tensor:
    """-> [Tq, H, D]"""
    return plain.paged_attention(q, cache, tables, q_lens, kv_lens, scale)


def gather(cache: torch.Tensor, table: torch.Tensor, kv_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gathers keys and values of one sequence, each [Hkv, kv_len, D]"""
    return plain.gather(cache, table, kv_len)
