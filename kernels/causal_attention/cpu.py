"""Past and present apart: all queries see the whole past, so that part needs no mask, and grouped heads
are simply more queries; the present is a square with torch's own causal rule. Their log-sum-exps merge them.
"""

import torch

from vllm_dlm.kernels.paged_attention.sdpa import gather

#: bytes of keys and values laid out in one piece at a time
GATHERED = 1 << 26


def causal_attention(q, pages, tables, q_lens, kv_lens, scale):
    out = torch.empty_like(q)
    parts = zip(q.split(list(q_lens)), out.split(list(q_lens)), tables, kv_lens, strict=True)
    for query, place, table, kv_len in parts:
        if len(query):
            attend(query, pages, table, kv_len, scale, place)
    return out


def attend(query, pages, table, kv_len, scale, out):
    """query and out [L, H, D], table [n] blocks of one sequence"""
    kv_heads, block_size, width = pages.shape[1:]
    group = query.shape[1] // kv_heads
    table = table[: -(-kv_len // block_size)].long()
    bytes_per_head = len(table) * block_size * width * pages.element_size()
    step = max(1, GATHERED // bytes_per_head)
    for head in range(0, kv_heads, step):
        own = slice(head * group, (head + step) * group)
        # A slice of heads is no view [blocks * heads, …]: few heads are gathered one by one.
        if step >= kv_heads:
            key, value = gather(pages, table, kv_len)  # [Hkv, N, D]
        else:
            some = pages[:, head : head + step].index_select(0, table).transpose(0, 1)  # [h, n, block, 2D]
            key, value = some.flatten(1, 2)[:, :kv_len].chunk(2, -1)
        out[:, own] = merged(query[:, own], key, value, scale)


def merged(query, key, value, scale):
    """query [L, h * G, D], key and value [h, N, D] -> [L, h * G, D]"""
    count, heads, dim = query.shape
    kv_heads, length = key.shape[:2]
    past, group = length - count, heads // kv_heads
    rows = query.transpose(0, 1)  # [h * G, L, D]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    own_key, own_value = (part[:, past:].repeat_interleave(group, 0)[None] for part in (key, value))
    present, present_lse = flash(rows[None], own_key, own_value, 0.0, True, scale=scale)
    if not past:
        return present[0].transpose(0, 1)
    packed = rows.reshape(1, kv_heads, group * count, dim)
    before, before_lse = flash(packed, key[None, :, :past], value[None, :, :past], scale=scale)
    before, before_lse = before.reshape(heads, count, dim), before_lse.reshape(heads, count, 1)
    # the share of the present in all weights
    share = torch.sigmoid(present_lse.reshape(heads, count, 1) - before_lse)
    return torch.lerp(before.float(), present[0].float(), share.float()).to(query.dtype).transpose(0, 1)
