"""One scaled_dot_product_attention per canvas. The result of a canvas does not depend on the other canvases."""

import torch

from vllm_dlm.kernels.paged_attention import gather
from vllm_dlm.kernels.shadow_attention.torch import masked_attention


def draft_attention(q, q_counts, rows, k, v, drafted, cache, tables, kv_lens, scale):
    """See dispatch.py"""
    out = torch.empty_like(q)
    first = begin = 0
    for count, places, blocks, length in zip(q_counts, drafted, tables, kv_lens, strict=True):
        number = len(places)
        if count:
            keys, values = gather(cache, blocks[: -(-length // cache.shape[2])], length)  # [Hkv, N, D]
            own = slice(begin, begin + 2 * number)
            keys = torch.cat([keys, k[own].transpose(0, 1)], 1)
            values = torch.cat([values, v[own].transpose(0, 1)], 1)
            row = rows[first : first + count, None]
            index, draft = row % number, row < number  # [n, 1]
            other = torch.arange(number, device=q.device)
            cached = torch.ones(length, dtype=torch.bool, device=q.device).index_fill_(0, places, False)
            drafts = (other < index) | (draft & (other == index))
            masks = (other > index) | (~draft & (other == index))
            seen = torch.cat([cached.expand(count, -1), drafts, masks], 1)  # [n, N + 2 * S]
            out[first : first + count] = masked_attention(q[first : first + count], keys, values, seen, scale)
        first, begin = first + count, begin + 2 * number
    return out
