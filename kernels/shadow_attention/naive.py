"""The definition: a softmax over all keys of the canvas except one, and all keys of the shadow rows."""

from itertools import pairwise

import torch


def shadow_attention(q, q_starts, hidden, k, v, k_starts, cache, tables, kv_lens, scale):
    """See dispatch.py"""
    dim, group = q.shape[2], q.shape[1] // k.shape[1]
    spans = zip(pairwise(q_starts.tolist()), pairwise(k_starts.tolist()), tables.long(), kv_lens.tolist(), strict=True)
    out = torch.empty_like(q)
    for (first, end), (begin, stop), blocks, length in spans:
        pages = cache[blocks.clamp_min(0)].transpose(1, 2).flatten(0, 1)[:length]  # [N, Hkv, 2 * D]
        keys = torch.cat([pages[..., :dim], k[begin:stop]]).double()
        values = torch.cat([pages[..., dim:], v[begin:stop]]).double()
        for row in range(first, end):
            seen = torch.arange(len(keys)) != hidden[row]
            for head in range(q.shape[1]):
                weights = (keys[seen, head // group] @ q[row, head].double() * scale).softmax(0)
                out[row, head] = (weights @ values[seen, head // group]).to(out.dtype)
    return out
