"""One scaled_dot_product_attention per canvas, with a mask that hides one key per row. The result of a canvas does not
depend on the other canvases."""

from itertools import pairwise

import torch
import torch.nn.functional as F

from vllm_dlm.kernels.paged_attention import gather


def shadow_attention(q, q_starts, hidden, k, v, k_starts, cache, tables, kv_lens, scale):
    """See dispatch.py"""
    out = torch.empty_like(q)
    spans = zip(pairwise(q_starts.tolist()), pairwise(k_starts.tolist()), tables, kv_lens.tolist(), strict=True)
    for (first, end), (begin, stop), blocks, length in spans:
        if first < end:
            keys, values = gather(cache, blocks[: -(-length // cache.shape[2])], length)
            keys = torch.cat([keys, k[begin:stop].transpose(0, 1)], 1)
            values = torch.cat([values, v[begin:stop].transpose(0, 1)], 1)
            seen = torch.arange(keys.shape[1], device=keys.device) != hidden[first:end, None]
            out[first:end] = masked_attention(q[first:end], keys, values, seen, scale)
    return out


def masked_attention(query, key, value, seen, scale):
    """query [L, H, D], key and value [Hkv, N, D], seen [L, N] -> [L, H, D]"""
    length, heads, dim = query.shape
    kv_heads = len(key)
    # fold the query heads that share a key head into its queries: [1, Hkv, G * L, D]
    packed = query.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).reshape(1, kv_heads, -1, dim)
    seen = seen.repeat(heads // kv_heads, 1)[None, None]
    context = F.scaled_dot_product_attention(packed, key[None], value[None], attn_mask=seen, scale=scale)
    return context.view(kv_heads, -1, length, dim).permute(2, 0, 1, 3).reshape(length, heads, dim)
