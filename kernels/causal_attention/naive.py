"""The definition, in float64: pages laid out as one sequence, and a mask over the future."""

import torch


def causal_attention(q, pages, tables, q_lens, kv_lens, scale):
    dim, group = q.shape[2], q.shape[1] // pages.shape[1]
    out, start = torch.empty_like(q), 0
    for table, count, length in zip(tables, q_lens, kv_lens, strict=True):
        # [n, Hkv, block, 2D] -> [N, H, 2D]
        kv = pages[table.long()].transpose(1, 2).flatten(0, 1)[:length].double().repeat_interleave(group, 1)
        query = q[start : start + count].double() * scale
        future = torch.arange(length) > torch.arange(length - count, length)[:, None]
        weights = torch.einsum("qhd,khd->hqk", query, kv[..., :dim]).masked_fill(future, -torch.inf).softmax(-1)
        out[start : start + count] = torch.einsum("hqk,khd->qhd", weights, kv[..., dim:]).to(q.dtype)
        start += count
    return out
