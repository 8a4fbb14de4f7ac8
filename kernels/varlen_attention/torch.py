"""torch's scaled_dot_product_attention, one call per sequence.

Without a causal mask, attention does not depend on a query's position. The
query heads that share a key head can therefore be folded into that head's
queries, and grouped-query attention needs no repeated keys.
"""

import torch
import torch.nn.functional as F


def varlen_attention(q, k, v, q_lens, kv_lens, scale):
    """See dispatch.py"""
    out = torch.empty_like(q)
    q_parts, k_parts, v_parts = q.split(list(q_lens)), k.split(list(kv_lens)), v.split(list(kv_lens))
    for query, key, value, place in zip(q_parts, k_parts, v_parts, out.split(list(q_lens)), strict=True):
        place.copy_(grouped_attention(query, key.transpose(0, 1), value.transpose(0, 1), scale))
    return out


def grouped_attention(query, key, value, scale):
    """query [L, H, D], key and value [Hkv, N, D] -> [L, H, D]"""
    length, heads, dim = query.shape
    kv_heads = key.shape[0]
    group = heads // kv_heads
    # [L, Hkv * G, D] -> [1, Hkv, G * L, D]
    packed = query.unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3).reshape(1, kv_heads, group * length, dim)
    context = F.scaled_dot_product_attention(packed, key[None], value[None], scale=scale)
    return context.view(kv_heads, group, length, dim).permute(2, 0, 1, 3).reshape(length, heads, dim)
