"""Reference: reads keys and values number by number, then computes a softmax over all keys of each sequence."""

import torch

from vllm_dlm.kernels.varlen_attention.naive import varlen_attention


def packed_attention(q, keys, values, q_lens, kv_lens, tables, scale):
    """q [n, H, D]; `tables`: blocks of each sequence -> [n, H, D]"""
    slots = [
        (int(table[place // keys.size]), place % keys.size)
        for table, length in zip(tables, kv_lens, strict=True)
        for place in range(length)
    ]
    k, v = (torch.stack([number(cache, *slot, half) for slot in slots]) for cache, half in ((keys, 0), (values, 1)))
    return varlen_attention(q, k, v, q_lens, kv_lens, scale)


def number(cache, block, offset, half):
    """[Hkv, D] key (0) or value (1) of one position"""
    order = (cache.layout.keys, cache.layout.values)[half][offset]
    flat = cache.memory.reshape(len(cache.memory), cache.kv_heads, 2, -1)
    return flat[block, :, half][:, order]
