"""The definition, in float64: the whole attention matrix, then its changed columns."""

import torch


def delta_attention(query, key, changed, delta, scale):
    """query [L, H, D], key [Hkv, N, D], changed [S] key indices, delta [S, Hkv, D] -> [L, H, D]"""
    group = query.shape[1] // key.shape[0]
    keys = key.double().repeat_interleave(group, 0)  # [H, N, D]
    weight = torch.einsum("lhd,hnd->hln", query.double() * scale, keys).softmax(-1)[..., changed]
    return torch.einsum("hls,shd->lhd", weight, delta.double().repeat_interleave(group, 1)).to(query.dtype)
