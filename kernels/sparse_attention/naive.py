"""The definition, in float64: the whole sequence, and a mask over what was not chosen."""

import torch


def sparse_attention(q, q_starts, cache, page_table, chosen, kv_lens, page_size, scale, causal):
    """See dispatch.py"""
    blocks, kv_heads, block_size, width = cache.shape
    per_block, dim, group = block_size // page_size, width // 2, q.shape[1] // kv_heads
    by_page = cache.view(blocks, kv_heads, per_block, page_size, width).transpose(1, 2).flatten(0, 1)
    out = torch.empty_like(q)
    for b in range(len(page_table)):
        rows = slice(int(q_starts[b]), int(q_starts[b + 1]))
        count, length = rows.stop - rows.start, int(kv_lens[b])
        position = torch.arange(length)
        kv = by_page[page_table[b, : -(-length // page_size)].long()]  # [n, Hkv, P, 2D]
        kv = kv.transpose(0, 1).flatten(1, 2)[:, :length].double()  # [Hkv, N, 2D]
        for h in range(kv_heads):
            seen = torch.isin(position // page_size, chosen[b, h].long())
            mask = seen.expand(count, length)
            if causal:
                mask = mask & (position <= length - count + torch.arange(count)[:, None])
            for head in range(h * group, (h + 1) * group):
                logits = q[rows, head].double() @ kv[h, :, :dim].T * scale
                weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
                out[rows, head] = (weights @ kv[h, :, dim:]).to(q.dtype)
    return out
