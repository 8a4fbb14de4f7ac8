"""The definition, in float64: a softmax over all keys of the sequence."""

import torch


def varlen_attention(q, k, v, q_lens, kv_lens, scale):
    """See dispatch.py"""
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    q_end = kv_end = 0
    for q_len, kv_len in zip(q_lens, kv_lens, strict=True):
        queries, keys = slice(q_end, q_end := q_end + q_len), slice(kv_end, kv_end := kv_end + kv_len)
        key = k[keys].double().repeat_interleave(group, 1)  # [Lk, H, D]
        value = v[keys].double().repeat_interleave(group, 1)
        weight = torch.einsum("qhd,khd->hqk", q[queries].double() * scale, key).softmax(-1)
        out[queries] = torch.einsum("hqk,khd->qhd", weight, value).to(q.dtype)
    return out
