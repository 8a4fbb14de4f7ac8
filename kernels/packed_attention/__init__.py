"""Bidirectional attention over a KV cache that is stored as vLLM's CPU attention reads it.

The kernels of an instruction set read the keys and values of a block and head in an order of their own.
`Layout` is that order, `PackedCache` a layer's cache in it, with the reads and writes that policies and
selections need. Where `layout_for` finds none, caches stay plain and attention is torch's.
"""

from vllm_dlm.kernels.packed_attention.cache import Layout, PackedCache, read_key_runs, read_runs
from vllm_dlm.kernels.packed_attention.dispatch import Plan, layout_for, packed_attention, plan

__all__ = ["Layout", "PackedCache", "Plan", "layout_for", "packed_attention", "plan", "read_key_runs", "read_runs"]
