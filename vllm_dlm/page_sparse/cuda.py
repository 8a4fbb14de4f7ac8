"""Attention backend for CUDA: page kernels for rows that choose pages, vLLM's FlashAttention for the other rows.

Steps with one row per request use the page kernels for all rows, because vLLM
captures such steps as CUDA graphs (single_rows.py).

Read in vLLM 0.32: v1/attention/backends/flash_attn.py, v1/attention/backend.py.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_dlm.configuration import selection_of
from vllm_dlm.kernels.sparse_attention import sparse_attention
from vllm_dlm.page_sparse.page_counts import PageCounts
from vllm_dlm.page_sparse.partition import Partition, partition, prompt_lengths
from vllm_dlm.page_sparse.queries import Queries, all_to_device, chosen_pages, make_queries
from vllm_dlm.page_sparse.single_rows import SingleRows, ended_pages
from vllm_dlm.plugins.selection.base import Summaries
from vllm_dlm.plugins.selection.pages import PageSelection


class SelectingFlashBackend(FlashAttentionBackend):
    # FlashAttention's backend sets this since vLLM 0.33. A forward without keys would not summarize full pages.
    supports_kv_cache_update_bypass: bool = False

    @staticmethod
    def get_name() -> str:
        return "DLM_SELECTING_FLASH"

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # The page kernels need the keys of a page and head to be contiguous.
        return (KVCacheLayout.LBHNC,)

    @staticmethod
    def get_impl_cls() -> type["SelectingFlashImpl"]:
        return SelectingFlashImpl

    @staticmethod
    def get_builder_cls() -> type["SelectingFlashBuilder"]:
        return SelectingFlashBuilder


@dataclass
class SelectingFlashMetadata(FlashAttentionMetadata):
    full_pages: torch.Tensor | None = None  # [m] pages whose last position is written in this step, padded with -1
    sparse: Queries | None = None
    #: with `sparse`: the other rows as a separate batch
    dense: FlashAttentionMetadata | None = None
    dense_rows: torch.Tensor | None = None


class SelectingFlashBuilder(FlashAttentionMetadataBuilder):
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    supports_update_block_table: bool = False

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.selection = selection_of(vllm_config)
        self.supports_draft_decode_metadata_update = False
        # These layers' FlashAttention calls are never captured, so the number of splits need not be fixed.
        self.use_full_cuda_graph, self.max_num_splits = False, 0
        self.single_rows = SingleRows(
            self.selection,
            vllm_config.scheduler_config.max_num_seqs,
            vllm_config.model_config.max_model_len,
            self.block_size // self.selection.unit,
            device,
        )
        #: metadata of a step -> prompt length of each request; the worker sets this and collects the counts
        self.prompt_lens = lambda common: None
        self.counts = PageCounts()

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> SelectingFlashMetadata:
        common = common_attn_metadata
        # The host's lengths are upper bounds of the device's. They are exact except for unverified draft tokens.
        bound = common.seq_lens_cpu_upper_bound
        kv_lens = (common.seq_lens.cpu() if bound is None else bound)[: common.num_reqs].tolist()
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
        plan = partition(self.selection, starts, kv_lens, prompt_lengths(common, self.prompt_lens(common)))
        self.counts.add(plan.counts(self.selection), len(self.layer_names))
        if common.max_query_len == 1:
            return self._single_rows(common, {request for request, _, _ in plan.sparse})
        return self._mixed(common, fast_build, plan, starts, kv_lens)

    def build_for_cudagraph_capture(self, common_attn_metadata) -> SelectingFlashMetadata:
        """Metadata for capture: no row chooses pages, since dummy requests have no prompt lengths."""
        if common_attn_metadata.max_query_len != 1:
            raise NotImplementedError("dlm.selection: only steps of one row per request are captured as CUDA graphs")
        return self._single_rows(common_attn_metadata, set())

    def _single_rows(self, common, choosing: set[int]) -> SelectingFlashMetadata:
        rows, filled = self.single_rows.fill(common, choosing)
        return SelectingFlashMetadata(**vars(super().build(0, common, True)), full_pages=filled, sparse=rows)

    def _mixed(self, common, fast_build: bool, plan: Partition, starts, kv_lens) -> SelectingFlashMetadata:
        """Metadata of a step with prompts or draft tokens, which runs without a CUDA graph."""
        size = self.selection.unit
        step = super().build(0, common, fast_build or bool(plan.sparse))
        slots = common.slot_mapping[: common.num_actual_tokens]
        meta = SelectingFlashMetadata(**vars(step), full_pages=filled_pages(slots, starts, size))
        if plan.sparse:
            requests, rows, keys = map(list, zip(*plan.sparse, strict=True))
            index, unseen = all_to_device(self.device, requests, unseen_keys(kv_lens, requests, keys))
            meta.sparse = make_queries(
                self.selection,
                rows,
                common.seq_lens[index] - unseen.to(torch.int32),
                keys,
                common.block_table_tensor[index],
                self.block_size // size,
            )
            if plan.prompt or plan.whole:
                self._add_dense(meta, plan, common, kv_lens)
        return meta

    def _add_dense(self, meta: SelectingFlashMetadata, plan: Partition, common, kv_lens: list[int]) -> None:
        requests, counts, keys, rows = plan.dense()
        starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
        index, unseen, meta.dense_rows, on_device = all_to_device(
            self.device, requests, unseen_keys(kv_lens, requests, keys), rows, starts.tolist()
        )
        batch = common.replace(
            query_start_loc=on_device.to(torch.int32),
            query_start_loc_cpu=starts,
            seq_lens=common.seq_lens[index] - unseen.to(torch.int32),
            seq_lens_cpu_upper_bound=torch.tensor(keys, dtype=torch.int32),
            num_reqs=len(requests),
            num_actual_tokens=len(rows),
            max_query_len=max(counts),
            max_seq_len=max(keys),
            block_table_tensor=common.block_table_tensor[index],
            is_prefilling=None,
            positions=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )
        meta.dense = super().build(0, batch, True)


def unseen_keys(kv_lens: list[int], requests: list[int], keys: list[int]) -> list[int]:
    """Number of keys of its request after each part of a step."""
    return [kv_lens[request] - n for request, n in zip(requests, keys, strict=True)]


def filled_pages(slots: torch.Tensor, starts: list[int], size: int) -> torch.Tensor:
    """Pages whose last position is among `slots` [T], padded with -1. The host bounds their number by the rows of each
    request, without reading `slots`."""
    pages = ended_pages(slots, size)
    most = sum(-(-(end - start) // size) for start, end in pairwise(starts))
    return pages if most >= len(pages) else pages.topk(most).values


class SelectingFlashImpl(FlashAttentionImpl):
    selection: PageSelection  # set when the layer is built (layer_backends.py)
    summaries: Summaries | None = None  # set when the KV cache is allocated (summaries.py)

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ):
        """query and output [T, H, D], kv_cache [blocks, Hkv, block_size, 2 * D], which already has the new keys"""
        meta: SelectingFlashMetadata | None = attn_metadata
        parent = super().forward
        if meta is None or self.summaries is None:  # profiling
            return parent(layer, query, key, value, kv_cache, meta, output, output_scale, output_block_scale)
        if key is not None and self.kv_sharing_target_layer_name is None:
            self.selection.store(kv_cache, meta.full_pages, self.summaries)
        if meta.sparse is None:
            return parent(layer, query, key, value, kv_cache, meta, output, output_scale, output_block_scale)
        if meta.dense is not None:
            part = query[meta.dense_rows]
            context = torch.empty_like(part)
            parent(layer, part, key, value, kv_cache, meta.dense, context, output_scale, output_block_scale)
            output[meta.dense_rows] = context
        rows = meta.sparse
        q, in_place = query[rows.rows], isinstance(rows.rows, slice)
        chosen = chosen_pages(q, rows, self.summaries, self.selection, kv_cache)
        context = sparse_attention(
            q,
            rows.q_starts,
            kv_cache,
            rows.page_table,
            chosen,
            rows.kv_lens,
            self.selection.unit,
            self.scale,
            True,
            out=output[rows.rows] if in_place else None,
            tails=rows.num_pages,
            tail=rows.tail,
        )
        if not in_place:
            output[rows.rows] = context
        return output
