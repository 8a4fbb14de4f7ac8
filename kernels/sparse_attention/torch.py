"""The chosen pages gathered into one piece, then a fused attention without a mask where none is needed."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from vllm_dlm.kernels.top_pages import physical_pages

#: rows of queries per key head up to which products are faster than the fused kernel
FEW = 16


def sparse_attention(q, q_starts, cache, page_table, chosen, kv_lens, page_size, scale, causal):
    """See dispatch.py"""
    counts, lengths = q_starts.diff().tolist(), kv_lens.tolist()
    # Requests alike in queries, and in what of their last page is filled, share one call.
    kinds: dict[tuple[int, int], list[int]] = {}
    for b, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        if count:
            kinds.setdefault((count, length % page_size), []).append(b)
    if len(kinds) == 1 and len(next(iter(kinds.values()))) == len(counts):
        return _alike(q, counts[0], cache, page_table, chosen, kv_lens, page_size, scale, causal)
    out = torch.empty_like(q)
    for (count, _), members in kinds.items():
        own = torch.tensor(members)
        rows = (q_starts[own][:, None] + torch.arange(count)).flatten()
        out[rows] = _alike(q[rows], count, cache, page_table[own], chosen[own], kv_lens[own], page_size, scale, causal)
    return out


def by_products(rows, keys, values, scale):
    """Two matrix products and a softmax: for a handful of rows the fused kernel takes twice as long. Logits are
    rounded to bfloat16 as the keys they come from are."""
    logits = rows @ keys.contiguous().transpose(2, 3)  # products with keys that lie apart are many times slower
    return logits.float().mul_(scale).softmax(-1).to(rows.dtype) @ values


def _alike(q, count, cache, page_table, chosen, kv_lens, page_size, scale, causal):
    _blocks, kv_heads, block_size, width = cache.shape
    batch, heads, dim = len(page_table), q.shape[1], width // 2
    per_block = block_size // page_size
    filled = chosen >= 0  # [B, Hkv, K]
    number = filled.sum(-1)
    kept = int(number.max())
    logical = chosen[..., :kept].clamp_min(0).long()
    page = physical_pages(page_table, logical)  # [B, Hkv, kept]
    row = ((page // per_block) * kv_heads + torch.arange(kv_heads)[:, None]) * per_block + page % per_block
    kv = cache.view(-1, page_size * width).index_select(0, row.flatten())
    kv = kv.view(batch, kv_heads, kept * page_size, width)
    # position of each gathered key; only its last page may be partly filled
    tail = int(kv_lens[0]) % page_size
    last = (kv_lens - 1) // page_size
    ends = logical.gather(-1, number[..., None] - 1)[..., 0] == last[:, None]  # [B, Hkv]
    # [B * L, Hkv * G, D] -> [B, Hkv, L * G, D]
    rows = q.view(batch, count, kv_heads, heads // kv_heads, dim).transpose(1, 2).flatten(2, 3)
    plain = int(number.min()) == kept and (not tail or bool(ends.all())) and (not causal or count == 1)
    mask = None
    if plain:
        if tail:
            kv = kv[:, :, : (kept - 1) * page_size + tail]
    else:
        position = (logical[..., None] * page_size + torch.arange(page_size)).flatten(2)  # [B, Hkv, keys]
        there = filled[..., :kept].repeat_interleave(page_size, -1) & (position < kv_lens[:, None, None])
        kv = kv.masked_fill(~there[..., None], 0.0)  # what lies beyond the end may be anything, NaN included
        mask = there[:, :, None].expand(-1, -1, count, -1)
        if causal:
            own = kv_lens[:, None] - count + torch.arange(count)  # [B, L] position of each query
            mask = mask & (position[:, :, None] <= own[:, None, :, None])
        mask = mask.repeat_interleave(heads // kv_heads, 2)
    if mask is None and rows.shape[2] <= FEW and rows.dtype == torch.bfloat16:
        context = by_products(rows, kv[..., :dim], kv[..., dim:], scale)
    else:
        context = scaled_dot_product_attention(rows, kv[..., :dim], kv[..., dim:], attn_mask=mask, scale=scale)
    context = context.view(batch, kv_heads, count, heads // kv_heads, dim).transpose(1, 2)
    return context.reshape(batch * count, heads, dim)
