"""A fused attention over all keys computes the normalizer, then only the changed columns are multiplied.

The attention matrix is never materialized. The fused kernel returns each
query's log-sum-exp over all keys. The weights of the changed keys follow from
it and from their own scores.
"""

import torch

from vllm_dlm.kernels.packed_attention import read_key_runs
from vllm_dlm.kernels.varlen_attention.torch import grouped_attention

#: queries per head scored at once
CHUNK = 256


def delta_attention(query, key, columns, delta, scale):
    """See dispatch.py"""
    length, heads, dim = query.shape
    kv_heads = key.shape[0]
    if not len(delta):
        return torch.zeros_like(query)
    # fold the query heads that share a key head into its queries: [L, Hkv * G, D] -> [Hkv, G * L, D]
    packed = query.unflatten(1, (kv_heads, heads // kv_heads)).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim)
    lse = log_sum_exp(packed, key, scale)  # [Hkv, G * L]
    columns, moves = columns.float().transpose(1, 2), delta.float().transpose(0, 1)
    parts = []
    for part, norm in zip(packed.split(CHUNK, 1), lse.split(CHUNK, 1), strict=True):
        score = torch.bmm(part.float() * scale, columns)  # [Hkv, chunk, S]
        parts.append(torch.bmm((score - norm[..., None]).exp_(), moves))  # [Hkv, chunk, D]
    moved = torch.cat(parts, 1)  # [Hkv, G * L, D]
    moved = moved.view(kv_heads, -1, length, dim).permute(2, 0, 1, 3).reshape(length, heads, dim)
    return moved.to(query.dtype)


def log_sum_exp(packed: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    if packed.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        # Only the log-sum-exp is used, so any tensor of the right shape can stand in for the values.
        return flash(packed[None], key[None], key[None], scale=scale)[1][0]
    parts = [
        torch.bmm(part.float() * scale, key.float().transpose(1, 2)).logsumexp(-1) for part in packed.split(CHUNK, 1)
    ]
    return torch.cat(parts, 1)


def delta_over_pages(q, q_starts, cache, tables, kv_lens, place, moved, scale):
    """See dispatch.py. If few of many keys have changed, one fused attention over all keys is fastest, with the
    changes and zeros as values."""
    out, (_, kv_heads, size, _) = torch.empty_like(q), cache.shape
    starts, head = q_starts.tolist(), torch.arange(kv_heads)[:, None]
    for c, length in enumerate(kv_lens.tolist()):
        rows = slice(starts[c], starts[c + 1])
        changed = (place[c, :length] >= 0).nonzero()[:, 0]
        if not len(changed) or rows.start == rows.stop:
            out[rows] = 0
            continue
        index = (tables[c, : -(-length // size)].long() * kv_heads + head).flatten()
        key = read_key_runs(cache, index, size).reshape(kv_heads, -1, q.shape[2])[:, :length]
        value = torch.zeros(key.shape, dtype=key.dtype)
        value[:, changed] = moved[place[c, changed].long()].transpose(0, 1)
        out[rows] = grouped_attention(q[rows], key, value, scale)
    return out
