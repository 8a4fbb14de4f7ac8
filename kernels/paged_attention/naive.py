"""The definition: blocks concatenated to one sequence, then a softmax over all of its keys."""

import torch

from vllm_dlm.kernels.varlen_attention.naive import varlen_attention


def paged_attention(q, cache, tables, q_lens, kv_lens, scale):
    """See dispatch.py"""
    dim = q.shape[2]
    # [n, Hkv, block, 2D] -> [n * block, Hkv, 2D]
    kv = torch.cat([cache[t].transpose(1, 2).flatten(0, 1)[:n] for t, n in zip(tables, kv_lens, strict=True)])
    return varlen_attention(q, kv[..., :dim], kv[..., dim:], q_lens, kv_lens, scale)
