"""The definition, in float64: each changed key's weight, normalized over all keys, times the change of its value."""

import torch


def delta_attention(query, key, columns, delta, scale):
    """See dispatch.py"""
    group = query.shape[1] // key.shape[0]
    query_, key_, columns_ = (
        query.double() * scale,
        *(part.double().repeat_interleave(group, 0) for part in (key, columns)),
    )
    norm = torch.einsum("lhd,hnd->hln", query_, key_).logsumexp(-1, keepdim=True)
    weight = (torch.einsum("lhd,hsd->hls", query_, columns_) - norm).exp()
    return torch.einsum("hls,shd->lhd", weight, delta.double().repeat_interleave(group, 1)).to(query.dtype)


def delta_over_pages(q, q_starts, cache, tables, kv_lens, place, moved, scale):
    """See dispatch.py; rows after the last canvas are zeros"""
    out = torch.zeros_like(q)
    dim = q.shape[2]
    for c, table in enumerate(tables):
        rows = slice(int(q_starts[c]), int(q_starts[c + 1]))
        key = cache[table.long(), :, :, :dim].transpose(0, 1).flatten(1, 2)[:, : int(kv_lens[c])]  # [Hkv, N, D]
        changed = [j for j in range(key.shape[1]) if place[c, j] >= 0]
        out[rows] = delta_attention(q[rows], key, key[:, changed], moved[place[c, changed].long()], scale)
    return out
