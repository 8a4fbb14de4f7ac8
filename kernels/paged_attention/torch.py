"""One gather of whole blocks per table, and one scaled_dot_product_attention per sequence.

Consecutive sequences may share one table object: they read prefixes of different lengths of one canvas.
"""

import torch

from vllm_dlm.kernels.packed_attention import read_runs
from vllm_dlm.kernels.varlen_attention.torch import grouped_attention


def gather(cache, table, kv_len):
    """See dispatch.py. The gather is head-major, so each block of a head is copied as one contiguous piece."""
    _, kv_heads, size, width = cache.shape
    head = torch.arange(kv_heads, device=table.device)
    index = (table[None, :] * kv_heads + head[:, None]).flatten()  # (head, block) order
    kv = read_runs(cache, index, size).view(kv_heads, -1, width)[:, :kv_len]
    return kv.chunk(2, -1)


def paged_attention(q, cache, tables, q_lens, kv_lens, scale):
    """See dispatch.py"""
    out = torch.empty_like(q)
    parts = zip(q.split(list(q_lens)), out.split(list(q_lens)), tables, kv_lens, strict=True)
    gathered = None
    for query, place, table, kv_len in parts:
        if len(query):
            if table is not gathered:
                gathered, (keys, values) = table, gather(cache, table, len(table) * cache.shape[2])
            place.copy_(grouped_attention(query, keys[:, :kv_len], values[:, :kv_len], scale))
    return out
