"""vLLM's kernels. Read in vLLM 0.32 and 0.33:
vllm_flash_attn/flash_attn_interface.py, v1/attention/backends/fa_utils.py."""

import functools

from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.vllm_flash_attn import flash_attn_varlen_func


@functools.cache
def version(head_size: int) -> int:
    """Of the device: the function's own default has no code for SM90."""
    return get_flash_attn_version(head_size=head_size) or 2


def flash_attention(q, k, v, q_starts, k_starts, kv_lens, table, max_q, max_kv, scale):
    """See dispatch.py"""
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=q_starts, cu_seqlens_k=k_starts, seqused_k=kv_lens, block_table=table,
        max_seqlen_q=max_q, max_seqlen_k=max_kv, softmax_scale=scale, causal=False, fa_version=version(q.shape[2]),
    )  # fmt: skip
