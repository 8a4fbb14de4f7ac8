"""Runs vLLM's CPU attention kernels over pages instead of blocks.

A layer's cache is contiguous, [blocks, Hkv, block_size, 2 * D]. The kernels
accept any view of it that is laid out like blocks, so pages are passed as
blocks. For chosen pages, each pair of request and key head is passed as a
separate request with its own page table.

Read in vLLM 0.32: v1/attention/backends/cpu_attn.py, _custom_ops.py (`cpu_attn_*`).
"""

import functools
from dataclasses import dataclass

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_dlm.kernels.packed_attention import Layout, PackedCache
from vllm_dlm.kernels.packed_attention.vllm import layout


@dataclass(frozen=True)
class PackedPages:
    """Page layout and kernel calls for attention layers of one shape."""

    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype
    page_size: int

    @functools.cached_property
    def isa(self) -> str:
        return _get_attn_isa(self.dtype, self.page_size, self.dim)

    @functools.cached_property
    def layout(self) -> Layout:
        return layout(self.isa, self.dtype, self.page_size, self.dim)

    @functools.cached_property
    def order(self) -> torch.Tensor:
        """[P * D] place of each key element within a page and head"""
        return self.layout.keys.flatten()

    def _halves(self, kv_cache: torch.Tensor, kv_heads: int) -> tuple[torch.Tensor, ...]:
        """Keys and values [pages, Hkv, P, D]; within a page and head, all keys come before all values."""
        return kv_cache.view(-1, kv_heads, 2 * self.page_size, self.dim).chunk(2, dim=2)

    def write(self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor) -> None:
        """Writes key and value [T, Hkv, D] to slots [T], page * P + offset each; slots below 0 are skipped"""
        ops.cpu_attn_reshape_and_cache(key, value, *self._halves(kv_cache, key.shape[1]), slots, self.isa)

    def cache(self, kv_cache: torch.Tensor) -> PackedCache:
        """The cache with pages for blocks"""
        return PackedCache(kv_cache.view(-1, self.kv_heads, self.page_size, 2 * self.dim), self.layout)

    def keys(self, kv_cache: torch.Tensor, page_ids: torch.Tensor) -> torch.Tensor:
        """-> [n, Hkv, P, D]"""
        packed = self._halves(kv_cache, self.kv_heads)[0][page_ids].flatten(2)  # [n, Hkv, P * D]
        return packed[..., self.order].unflatten(-1, (self.page_size, self.dim))

    def batch(self, counts: list[int], kv_lens: torch.Tensor, page_table: torch.Tensor | None) -> "Batch":
        """Batch of requests that read everything. `counts`: queries of each request, at the last of its `kv_lens`
        positions ([B] int32). page_table [B, N]."""
        starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
        return self._batch(self.heads, self.kv_heads, starts, kv_lens, page_table, envs.VLLM_CPU_ATTN_SPLIT_KV)

    def chosen_batch(self, kv_lens: torch.Tensor, budget: int) -> "Batch":
        """Batch of requests with one query that read `budget` pages per key head; kv_lens [B] determines how far the
        last page is filled."""
        unfilled = -kv_lens % self.page_size
        lens = (budget * self.page_size - unfilled).to(torch.int32).repeat_interleave(self.kv_heads)
        starts = torch.arange(len(lens) + 1, dtype=torch.int32)
        # Keys of a head are not split, so a request's sums do not depend on the other requests of the step.
        return self._batch(self.heads // self.kv_heads, 1, starts, lens, None, False)

    def _batch(self, heads, kv_heads, starts, kv_lens, page_table, split) -> "Batch":
        plan = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(kv_lens),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=self.dim,
            seq_lens=kv_lens,
            dtype=self.dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=split,
        )
        return Batch(kv_heads, starts, kv_lens, page_table, plan)

    def attend(
        self, q: torch.Tensor, kv_cache: torch.Tensor, batch: "Batch", scale: float, output: torch.Tensor
    ) -> None:
        """Attention over all pages; q and output [T, H, D]"""
        self._attend(q, kv_cache, batch, batch.page_table, scale, output)

    def attend_chosen(
        self, q: torch.Tensor, kv_cache: torch.Tensor, batch: "Batch", pages: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """q [B, H, D], physical `pages` [B, Hkv, K], of which only the last may be partly filled -> [B, H, D]"""
        table = (pages * self.kv_heads + torch.arange(self.kv_heads)[:, None]).flatten(0, 1).to(torch.int32)
        q = q.reshape(len(table), -1, self.dim)  # [B * Hkv, G, D]
        output = torch.empty_like(q)
        self._attend(q, kv_cache, batch, table, scale, output)
        return output.view(-1, self.heads, self.dim)

    def _attend(self, q, kv_cache, batch, page_table, scale, output) -> None:
        keys, values = self._halves(kv_cache, batch.kv_heads)
        ops.cpu_attention_with_kv_cache(
            query=q,
            key_cache=keys,
            value_cache=values,
            output=output,
            query_start_loc=batch.starts,
            seq_lens=batch.kv_lens,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=page_table,
            softcap=0.0,
            scheduler_metadata=batch.plan,
            s_aux=None,
        )


#: layers of the same shape share one object, so the key packing is determined once
packed_pages = functools.cache(PackedPages)


@dataclass
class Batch:
    """Arguments that the kernel calls of all layers share in a step."""

    kv_heads: int
    starts: torch.Tensor  # [B + 1] int32
    kv_lens: torch.Tensor  # [B] int32
    page_table: torch.Tensor | None  # [B, N] int32; None: differs between layers
    plan: torch.Tensor  # the kernel's scheduler metadata: how work is split among threads
