"""Gathers the chosen pages into one tensor, then runs a fused attention, without a mask if none is needed."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from vllm_dlm.kernels.block_rows import read_keys
from vllm_dlm.kernels.delta_attention.torch import delta_attention
from vllm_dlm.kernels.packed_attention import read_runs
from vllm_dlm.kernels.top_pages import physical_pages

#: query rows per key head up to which plain matrix products are faster than the fused kernel
FEW = 16


def sparse_attention(
    q, q_starts, cache, page_table, chosen, kv_lens, page_size, scale, causal, q_ends=None, table_pages=1, out=None,
    rows=None, tails=None, tail=0,
):  # fmt: skip
    """See dispatch.py"""
    chosen = listed(chosen, kv_lens, page_size, rows, tails, tail)
    starts = q_starts[:-1] if q_ends is None else q_starts
    counts, lengths = ((q_starts[1:] if q_ends is None else q_ends) - starts).tolist(), kv_lens.tolist()
    numbers = (chosen[:, 0] >= 0).sum(-1).tolist()
    # Requests with the same number of queries, number of pages and fill of the last page share one call.
    kinds: dict[tuple[int, int, int], list[int]] = {}
    for b, (count, number, length) in enumerate(zip(counts, numbers, lengths, strict=True)):
        if count:
            kinds.setdefault((count, number, length % page_size), []).append(b)
    common = (cache, table_pages, page_size, scale, causal)
    if len(kinds) == 1 and sum(counts) == len(q) and len(next(iter(kinds.values()))) == len(counts):
        context = _alike(q, counts[0], page_table, chosen, kv_lens, *common)
        return context if out is None else out.copy_(context)
    out = torch.empty_like(q) if out is None else out
    for (count, _, _), members in kinds.items():
        if len(members) == 1:
            own = slice(members[0], members[0] + 1)
            queries = slice(int(starts[members[0]]), int(starts[members[0]]) + count)
        else:
            own = torch.tensor(members)
            queries = (starts[own][:, None] + torch.arange(count)).flatten()
        out[queries] = _alike(q[queries], count, page_table[own], chosen[own], kv_lens[own], *common)
    return out


def sparse_delta(
    q, q_starts, q_ends, cache, page_table, chosen, kv_lens, page_size, scale, moved, places, table_pages=1, out=None,
    rows=None, tails=None, tail=0,
):  # fmt: skip
    """See dispatch.py; request by request, with kernels/delta_attention"""
    chosen = listed(chosen, kv_lens, page_size, rows, tails, tail)
    out = torch.empty_like(q) if out is None else out
    dim = q.shape[2]
    for b, (start, end, length) in enumerate(zip(q_starts.tolist(), q_ends.tolist(), kv_lens.tolist(), strict=True)):
        if start == end:
            continue
        units = compact(chosen[b : b + 1])[0]
        keys = _gathered(cache, page_table[b : b + 1], units[None], page_size, table_pages)[0, ..., :dim]
        if (last := length % page_size) and int(units[0, -1]) == length // page_size:
            keys = keys[:, : keys.shape[1] - page_size + last]
        changed = (places[b] >= 0).nonzero()[:, 0]
        # a changed value contributes nothing to a head that does not read its page
        seen = torch.zeros(len(units), -(-length // page_size), dtype=torch.bool).scatter_(1, units.long(), True)
        values = moved[places[b][changed].long()] * seen[:, changed // page_size].T[..., None]
        block = page_table[b][changed // (page_size * table_pages)]
        columns = read_keys(cache, block, changed % cache.shape[2]).transpose(0, 1)
        out[start:end] = delta_attention(q[start:end], keys, columns, values, scale)
    return out


def listed(chosen, kv_lens, page_size, rows, tails, tail):
    """-> [B, Hkv, K + tail] pages that each request reads, -1 for none"""
    if rows is not None:
        chosen = chosen.index_select(0, rows)
    if tails is None:
        return chosen
    pages = tails[:, None] + torch.arange(tail, dtype=torch.int32)
    pages = pages.masked_fill_(pages * page_size >= kv_lens[:, None], -1)
    return torch.cat([chosen, pages[:, None].expand(-1, chosen.shape[1], -1)], 2)


def compact(chosen):
    """[B, Hkv, K] with -1 anywhere -> [B, Hkv, k] with -1 only at the end"""
    filled = chosen >= 0
    if bool(filled.all()):
        return chosen
    number = filled.sum(-1)
    if bool((filled[..., :-1] >= filled[..., 1:]).all()):
        return chosen[..., : int(number.max())]
    order = (~filled).to(torch.uint8).argsort(dim=-1, stable=True)[..., : int(number.max())]
    return chosen.gather(-1, order)


def by_products(rows, keys, values, scale):
    """Attention as two matrix products and a softmax. For few rows the fused kernel takes twice as long. Logits are
    rounded to the keys' dtype, bfloat16."""
    logits = rows @ keys.contiguous().transpose(2, 3)  # products with non-contiguous keys are many times slower
    return logits.float().mul_(scale).softmax(-1).to(rows.dtype) @ values


def _gathered(cache, page_table, pages, page_size, table_pages):
    """pages [B, Hkv, K], all valid -> their keys and values [B, Hkv, K * page_size, 2 * D]"""
    _blocks, kv_heads, block_size, width = cache.shape
    per_block = block_size // page_size
    if table_pages == 1:
        page = physical_pages(page_table, pages)
    else:
        page = physical_pages(page_table, pages // table_pages) * table_pages + pages % table_pages
    row = ((page // per_block) * kv_heads + torch.arange(kv_heads)[:, None]) * per_block + page % per_block
    return read_runs(cache, row.flatten(), page_size).view(*pages.shape[:2], -1, width)


def _alike(q, count, page_table, chosen, kv_lens, cache, table_pages, page_size, scale, causal):
    kv_heads, width = cache.shape[1], cache.shape[3]
    batch, heads, dim = len(page_table), q.shape[1], width // 2
    chosen = compact(chosen)
    filled = chosen >= 0  # [B, Hkv, K]
    number, kept = filled.sum(-1), chosen.shape[2]
    logical = chosen.clamp_min(0).long()
    kv = _gathered(cache, page_table, logical, page_size, table_pages)
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
        there = filled.repeat_interleave(page_size, -1) & (position < kv_lens[:, None, None])
        kv = kv.masked_fill(~there[..., None], 0.0)  # slots beyond the end may hold anything, including NaN
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
