"""One product for the scores, one reduction for the normaliser, and a product over the changed columns only."""

import torch


def delta_attention(query, key, changed, delta, scale):
    """query [L, H, D], key [Hkv, N, D], changed [S] key indices, delta [S, Hkv, D] -> [L, H, D]"""
    length, heads, dim = query.shape
    kv_heads = key.shape[0]
    group = heads // kv_heads
    packed = (query * scale).unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim)
    score = torch.bmm(packed.float(), key.float().transpose(1, 2))  # [Hkv, G * L, N]
    weight = (score[..., changed] - score.logsumexp(-1, keepdim=True)).exp_()  # [Hkv, G * L, S]
    moved = torch.bmm(weight, delta.float().transpose(0, 1))  # [Hkv, G * L, D]
    moved = moved.view(kv_heads, group, length, dim).permute(2, 0, 1, 3).reshape(length, heads, dim)
    return moved.to(query.dtype)
