"""The definition, in float64: each changed key's weight, normalised over all keys, times its value's move."""

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
