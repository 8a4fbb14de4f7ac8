"""The definition: a softmax over the cached keys of other positions, the drafts before a row and the masks after it."""

import torch


def draft_attention(q, q_counts, rows, k, v, drafted, cache, tables, kv_lens, scale):
    """See dispatch.py"""
    dim, group = q.shape[2], q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    first = begin = 0
    for count, places, blocks, length in zip(q_counts, drafted, tables, kv_lens, strict=True):
        number = len(places)
        pages = cache[blocks].transpose(1, 2).flatten(0, 1)[:length]  # [N, Hkv, 2 * D]
        keys = torch.cat([pages[..., :dim], k[begin : begin + 2 * number]]).double()
        values = torch.cat([pages[..., dim:], v[begin : begin + 2 * number]]).double()
        for row in range(first, first + count):
            own = int(rows[row])
            seen = [position for position in range(length) if position not in places.tolist()]
            seen += [length + j for j in range(number) if j < own % number or j == own]
            seen += [length + number + j for j in range(number) if j > own % number or number + j == own]
            for head in range(q.shape[1]):
                weights = (keys[seen, head // group] @ q[row, head].double() * scale).softmax(0)
                out[row, head] = (weights @ values[seen, head // group]).to(out.dtype)
        first, begin = first + count, begin + 2 * number
    return out
