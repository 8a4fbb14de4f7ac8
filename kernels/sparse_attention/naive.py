"""The definition, in float64: attention over the whole sequence with a mask that hides pages not chosen."""

import torch


def sparse_attention(
    q,
    q_starts,
    cache,
    page_table,
    chosen,
    kv_lens,
    page_size,
    scale,
    causal,
    q_ends=None,
    table_pages=1,
    out=None,
    rows=None,
    tails=None,
    tail=0,
):
    """See dispatch.py"""
    chosen = listed(chosen, kv_lens, page_size, rows, tails, tail)
    out = torch.empty_like(q) if out is None else out
    ends = q_starts[1:] if q_ends is None else q_ends
    for b in range(len(page_table)):
        rows = slice(int(q_starts[b]), int(ends[b]))
        kv = _keys_and_values(cache, page_table[b], int(kv_lens[b]), page_size * table_pages).double()
        values = kv[..., q.shape[2] :]
        out[rows] = _attended(q[rows].double(), kv, values, chosen[b], page_size, scale, causal).to(q.dtype)
    return out


def sparse_delta(
    q, q_starts, q_ends, cache, page_table, chosen, kv_lens, page_size, scale, moved, places, table_pages=1, out=None,
    rows=None, tails=None, tail=0,
):  # fmt: skip
    """See dispatch.py"""
    chosen = listed(chosen, kv_lens, page_size, rows, tails, tail)
    out = torch.empty_like(q) if out is None else out
    for b in range(len(page_table)):
        rows, length = slice(int(q_starts[b]), int(q_ends[b])), int(kv_lens[b])
        kv = _keys_and_values(cache, page_table[b], length, page_size * table_pages).double()
        place = places[b, :length]
        values = moved[place.clamp_min(0).long()].masked_fill((place < 0)[:, None, None], 0.0) if len(moved) else None
        values = torch.zeros_like(kv[..., : q.shape[2]]) if values is None else values.transpose(0, 1).double()
        out[rows] = _attended(q[rows].double(), kv, values, chosen[b], page_size, scale, False).to(q.dtype)
    return out


def listed(chosen, kv_lens, page_size, rows, tails, tail):
    """-> [B, Hkv, K + tail] pages that each request reads, padded with -1"""
    out = torch.full((len(kv_lens), chosen.shape[1], chosen.shape[2] + tail), -1, dtype=torch.int32)
    for b, length in enumerate(kv_lens.tolist()):
        out[b, :, : chosen.shape[2]] = chosen[b if rows is None else rows[b]]
        if tails is not None:
            pages = torch.arange(int(tails[b]), -(-length // page_size))
            out[b, :, chosen.shape[2] : chosen.shape[2] + len(pages)] = pages
    return out


def _keys_and_values(cache, table, length, size):
    """Gathers the first `length` positions of a table whose entries have `size` keys each -> [Hkv, length, 2 * D]"""
    blocks, kv_heads, _, width = cache.shape
    runs = cache.reshape(blocks, kv_heads, -1, size, width).transpose(1, 2).flatten(0, 1)
    return runs[table[: -(-length // size)].long()].transpose(0, 1).flatten(1, 2)[:, :length]


def _attended(q, kv, values, chosen, page_size, scale, causal):
    """q [L, H, D], kv [Hkv, N, 2 * D], values [Hkv, N, D], chosen [Hkv, K] -> [L, H, D]"""
    (count, heads, dim), (kv_heads, length, _) = q.shape, kv.shape
    position, out = torch.arange(length), torch.empty_like(q)
    for head in range(heads):
        h = head * kv_heads // heads
        mask = torch.isin(position // page_size, chosen[h].long()).expand(count, length)
        if causal:
            mask = mask & (position <= length - count + torch.arange(count)[:, None])
        logits = q[:, head] @ kv[h, :, :dim].T * scale
        out[:, head] = logits.masked_fill(~mask, -torch.inf).softmax(-1) @ values[h]
    return out
