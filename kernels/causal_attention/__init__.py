"""Attention of a sequence's last tokens over everything before them and themselves, keys and values in pages.

q [Tq, H, D], sequence after sequence; pages [blocks, Hkv, block_size, 2 * D],
keys before values; `tables[i]` names sequence i's blocks in order, `kv_lens[i]`
its keys, the last `q_lens[i]` of which belong to its queries. For CPUs: on CUDA
vLLM's FlashAttention reads the same pages.
"""

from vllm_dlm.kernels.causal_attention.cpu import causal_attention

__all__ = ["causal_attention"]
