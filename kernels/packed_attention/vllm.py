"""Calls vLLM's CPU attention so that the result of a row depends neither on other rows nor on the number of threads.

The kernel divides the queries of a request into tiles, and divides the keys by the length of the tile. Tiles of `TILE`
rows, the maximum that the kernel computes at once, are never divided and read all keys in one piece, or in pieces that
only depend on the number of keys. So each tile is passed as a separate request. A request's keys are not
split among threads either.

Query heads that share a key head become queries of that head, because the mask does not depend on positions.

Read in vLLM 0.32: v1/attention/backends/cpu_attn.py, _custom_ops.py (`cpu_attn_*`).
"""

import functools

import torch
from vllm import _custom_ops as ops

from vllm_dlm.kernels.packed_attention.cache import Layout

#: number of query rows of a head that the kernel of an instruction set computes at once (`MaxQHeadNumPerIteration`)
TILE = {"amx": 32, "vec": 8, "vec16": 16}


@functools.cache
def layout(isa: str, dtype: torch.dtype, size: int, dim: int) -> Layout:
    """Writes known numbers and finds their places. Numbers have three digits, which any dtype represents exactly."""
    number = torch.arange(size * dim)
    keys, values = torch.zeros_like(number), torch.zeros_like(number)
    for weight in (1, 128, 128**2):
        digit = number // weight % 128
        memory = torch.empty(1, 1, 2 * size, dim, dtype=dtype)
        rows = digit.view(size, 1, dim).to(dtype)
        write(rows, rows, memory[:, :, :size], memory[:, :, size:], torch.arange(size), isa)
        keys += weight * memory[:, :, :size].flatten().long()
        values += weight * memory[:, :, size:].flatten().long()
    for seen in (keys, values):
        if not torch.equal(seen.sort()[0], number):
            raise RuntimeError(
                f"vLLM's CPU attention ({isa}) does not store keys and values unchanged, unlike that of vLLM 0.32"
            )
    return Layout.of(isa, keys.argsort().view(size, dim), values.argsort().view(size, dim))


def write(k, v, keys, values, slots, isa):
    """k and v [n, Hkv, D] to slots [n], block * size + offset; slots below 0 are skipped"""
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
    ops.cpu_attn_reshape_and_cache(k, v, keys, values, slots, isa)


def schedule(isa: str, kv_heads: int, dim: int, dtype: torch.dtype, starts: torch.Tensor, lens: torch.Tensor):
    return ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(lens),
        num_heads=kv_heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        seq_lens=lens,
        dtype=dtype,
        query_start_loc=starts,
        causal=False,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=False,
    )


def packed_attention(q, keys, values, plan, scale):
    """See dispatch.py"""
    count, heads, dim = q.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    if group > 1:  # [n, Hkv * G, D] -> [n * G, Hkv, D]
        q = q.unflatten(1, (kv_heads, group)).transpose(1, 2).reshape(-1, kv_heads, dim)
    out = torch.empty(q.shape, dtype=q.dtype)
    ops.cpu_attention_with_kv_cache(
        query=q,
        key_cache=keys.halves()[0],
        value_cache=values.halves()[1],
        output=out,
        query_start_loc=plan.starts,
        seq_lens=plan.lens,
        scale=scale,
        causal=False,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=plan.table,
        softcap=0.0,
        scheduler_metadata=plan.schedule,
        s_aux=None,
    )
    if group > 1:
        out = out.view(count, group, kv_heads, dim).transpose(1, 2).reshape(count, heads, dim)
    return out
