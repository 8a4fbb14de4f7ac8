"""Bidirectional attention over a KV cache in the layout of vLLM's CPU attention.

The order of keys and values within a block and head depends on the instruction set. `Layout` is that order, and
`PackedCache` is a layer's cache in it, with reads and writes for policies and selections. If `layout_for` returns
None, caches are plain and attention uses torch.
"""

from vllm_dlm.kernels.packed_attention.cache import Layout, PackedCache, read_key_runs, read_runs
from vllm_dlm.kernels.packed_attention.dispatch import Plan, layout_for, packed_attention, plan

__all__ = ["Layout", "PackedCache", "Plan", "layout_for", "packed_attention", "plan", "read_key_runs", "read_runs"]
