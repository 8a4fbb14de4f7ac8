"""The same torch code everywhere, canvas by canvas. Nothing in it waits for the device."""

from collections.abc import Sequence

import torch

from vllm_dlm.kernels.draft_attention import torch as plain


def draft_attention(
    q: torch.Tensor,  # [n, H, D], queries packed canvas by canvas
    q_counts: Sequence[int],  # [C] number of queries of each canvas
    rows: torch.Tensor,  # [n] which of its canvas's 2 * S rows each query is: S drafts, then S masks
    k: torch.Tensor,  # [T, Hkv, D] of these rows of all canvases
    v: torch.Tensor,  # [T, Hkv, D]
    drafted: Sequence[torch.Tensor],  # per canvas [S] positions, whose cached keys no row attends to
    cache: torch.Tensor,  # [blocks, Hkv, block_size, 2 * D], keys before values
    tables: Sequence[torch.Tensor],  # per canvas [N] its blocks
    kv_lens: Sequence[int],  # [C] number of positions of each canvas
    scale: float,
) -> torch.Tensor:
    """Draft i attends to drafts up to i and to masks after i, mask i to drafts before i and to masks from i on
    -> [n, H, D]"""
    return plain.draft_attention(q, q_counts, rows, k, v, drafted, cache, tables, kv_lens, scale)
