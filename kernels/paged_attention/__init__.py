"""Bidirectional attention of packed queries over keys and values in pages.

q [Tq, H, D]; pages [blocks, Hkv, block_size, 2 * D], keys before values;
`tables[i]` names sequence i's pages in order and `kv_lens[i]` its keys.
"""

from vllm_dlm.kernels.paged_attention.torch import gather, paged_attention

__all__ = ["gather", "paged_attention"]
