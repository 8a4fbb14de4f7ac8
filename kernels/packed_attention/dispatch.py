"""Decides whether attention on a CPU uses vLLM's kernel, and calls it."""

import importlib.util
from collections.abc import Sequence
from typing import NamedTuple

import torch

from vllm_dlm.kernels.packed_attention.cache import Layout, PackedCache

#: head sizes that vLLM's kernels are compiled for
HEAD_SIZES = {32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512}


def layout_for(device: torch.device, dtype: torch.dtype, size: int, dim: int) -> Layout | None:
    """The layout of a cache with blocks of `size` positions; None: plain, with torch's attention. With vectors of 512
    bits or matrix units, vLLM's kernel is faster. With shorter vectors, it takes twice as long."""
    if device.type != "cpu" or not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()):
        return None
    return layout_of(dtype, size, dim)


def layout_of(dtype: torch.dtype, size: int, dim: int) -> Layout | None:
    """The layout of vLLM's kernel on any CPU"""
    if dim not in HEAD_SIZES or size % 16 or not importlib.util.find_spec("vllm"):
        return None
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    from vllm_dlm.kernels.packed_attention import vllm as kernel

    isa = _get_attn_isa(dtype, size, dim)
    return kernel.layout(isa, dtype, size, dim) if isa in kernel.TILE else None


class Plan(NamedTuple):
    """The tiles of a call's queries and the keys of each; the same for all layers with as many queries."""

    starts: torch.Tensor  # [tiles + 1] int32: index of the first query row of each tile
    lens: torch.Tensor  # [tiles] int32: number of keys
    table: torch.Tensor  # [tiles, blocks] int32
    schedule: torch.Tensor  # vLLM's schedule of threads


def plan(
    cache: PackedCache,
    heads: int,  # H, of the queries
    q_lens: Sequence[int],  # queries of each sequence
    kv_lens: Sequence[int],  # keys of each sequence
    table: torch.Tensor,  # [sequences, blocks] int32, any block beyond a sequence
) -> Plan:
    from vllm_dlm.kernels.packed_attention import vllm as kernel

    tile, group = kernel.TILE[cache.layout.isa], heads // cache.kv_heads
    lengths: list[int] = []
    owners: list[int] = []
    for number, count in enumerate(q_lens):
        whole, rest = divmod(count * group, tile)
        lengths += [tile] * whole + [rest] * bool(rest)
        owners += [number] * (whole + bool(rest))
    starts = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    lens = torch.tensor([kv_lens[number] for number in owners], dtype=torch.int32)
    own = table.expand(len(owners), -1) if len(table) == 1 else table[owners]
    schedule = kernel.schedule(cache.layout.isa, cache.kv_heads, cache.dim, cache.dtype, starts, lens)
    return Plan(starts, lens, own, schedule)


def packed_attention(
    q: torch.Tensor,  # [n, H, D], queries packed sequence by sequence
    keys: PackedCache,
    values: PackedCache,  # in the shape of `keys`; may be the same cache
    plan: Plan,
    scale: float,
) -> torch.Tensor:
    """-> [n, H, D]"""
    from vllm_dlm.kernels.packed_attention import vllm as kernel

    return kernel.packed_attention(q, keys, values, plan, scale) if len(q) else q
