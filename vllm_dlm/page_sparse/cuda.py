"""The backend on CUDA: vLLM's FlashAttention wherever everything is read, page kernels where pages are chosen.

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

from vllm_dlm.integration.autoregressive import selection_of
from vllm_dlm.kernels.sparse_attention import sparse_attention
from vllm_dlm.page_sparse.page_counts import PageCounts
from vllm_dlm.page_sparse.partition import Partition, partition, prompt_lengths
from vllm_dlm.page_sparse.queries import Queries, chosen_pages, make_queries, to_device
from vllm_dlm.plugins.selection.base import Summaries
from vllm_dlm.plugins.selection.pages import PageSelection


class SelectingFlashBackend(FlashAttentionBackend):
    # Since vLLM 0.33 FlashAttention's says yes; a forward without keys would leave full pages undescribed.
    supports_kv_cache_update_bypass: bool = False

    @staticmethod
    def get_name() -> str:
        return "DLM_SELECTING_FLASH"

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # A page of a head is one piece of memory.
        return (KVCacheLayout.LBHNC,)

    @staticmethod
    def get_impl_cls() -> type["SelectingFlashImpl"]:
        return SelectingFlashImpl

    @staticmethod
    def get_builder_cls() -> type["SelectingFlashBuilder"]:
        return SelectingFlashBuilder


@dataclass
class SelectingFlashMetadata(FlashAttentionMetadata):
    full_pages: torch.Tensor | None = None  # [m] pages whose last position is written in this step, and -1
    sparse: Queries | None = None
    #: with `sparse`: the other rows as a batch of their own
    dense: FlashAttentionMetadata | None = None
    dense_rows: torch.Tensor | None = None
    whole_rows: int = 0
    whole_pages: int = 0


class SelectingFlashBuilder(FlashAttentionMetadataBuilder):
    # Which rows choose depends on lengths, and so does the number of pages: launched one by one for now.
    _cudagraph_support = AttentionCGSupport.NEVER
    supports_update_block_table: bool = False

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.selection = selection_of(vllm_config)
        self.supports_draft_decode_metadata_update = False
        # Decided before the mode was: as no graph holds these layers, FlashAttention is free to split keys as it likes.
        self.use_full_cuda_graph, self.max_num_splits = False, 0
        #: metadata of a step -> prompt length of each of its requests; the worker knows
        self.prompt_lens = lambda common: None

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> SelectingFlashMetadata:
        common, size = common_attn_metadata, self.selection.unit
        # The host's lengths bound the device's: exact, but for drafts that are still being verified.
        bound = common.seq_lens_cpu_upper_bound
        kv_lens = (common.seq_lens.cpu() if bound is None else bound)[: common.num_reqs].tolist()
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
        plan = partition(self.selection, starts, kv_lens, prompt_lengths(common, self.prompt_lens(common)))

        step = super().build(common_prefix_len, common, fast_build or bool(plan.sparse))
        slots = common.slot_mapping[: common.num_actual_tokens]
        meta = SelectingFlashMetadata(**vars(step), full_pages=filled_pages(slots, starts, size))
        meta.whole_rows = len(plan.whole)
        meta.whole_pages = plan.whole_pages(size)
        if plan.sparse:
            requests, rows, keys = map(list, zip(*plan.sparse, strict=True))
            index = to_device(requests, self.device)
            behind = to_device([kv_lens[r] - n for r, n in zip(requests, keys, strict=True)], self.device, torch.int32)
            meta.sparse = make_queries(
                self.selection, rows, common.seq_lens[index] - behind, keys, common.block_table_tensor[index],
                self.block_size // size,
            )  # fmt: skip
            if plan.prompt or plan.whole:
                self._add_dense(meta, plan, common, kv_lens)
        return meta

    def _add_dense(self, meta: SelectingFlashMetadata, plan: Partition, common, kv_lens: list[int]) -> None:
        requests, counts, keys, rows = plan.dense()
        starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
        index = to_device(requests, self.device)
        behind = to_device([kv_lens[r] - n for r, n in zip(requests, keys, strict=True)], self.device, torch.int32)
        batch = common.replace(
            query_start_loc=starts.to(self.device, non_blocking=True), query_start_loc_cpu=starts,
            seq_lens=common.seq_lens[index] - behind, seq_lens_cpu_upper_bound=torch.tensor(keys, dtype=torch.int32),
            num_reqs=len(requests), num_actual_tokens=len(rows), max_query_len=max(counts), max_seq_len=max(keys),
            block_table_tensor=common.block_table_tensor[index], is_prefilling=None, positions=None,
            _num_computed_tokens_cache=None, _token_to_req_indices_cache=None,
        )  # fmt: skip
        meta.dense = super().build(0, batch, True)
        meta.dense_rows = to_device(rows, self.device)


def filled_pages(slots: torch.Tensor, starts: list[int], size: int) -> torch.Tensor:
    """Pages whose last position is among `slots` [T], and -1: as many as the rows of each request can fill, which the
    host knows without looking."""
    pages = torch.where((slots >= 0) & (slots % size == size - 1), slots // size, -1)
    most = sum(-(-(end - start) // size) for start, end in pairwise(starts))
    return pages if most >= len(pages) else pages.topk(most).values


class SelectingFlashImpl(FlashAttentionImpl):
    selection: PageSelection  # hung here by whoever made the layer (layer_backends.py)
    summaries: Summaries | None = None  # and here once the cache is allocated

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.counts = PageCounts()

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ):
        """query and output [T, H, D], kv_cache [blocks, Hkv, block_size, 2 * D], written to before"""
        meta: SelectingFlashMetadata | None = attn_metadata
        parent = super().forward
        if meta is None or self.summaries is None:  # profiling
            return parent(layer, query, key, value, kv_cache, meta, output, output_scale, output_block_scale)
        if key is not None and self.kv_sharing_target_layer_name is None:
            self.selection.store(kv_cache, meta.full_pages, self.summaries)
        if meta.whole_rows:
            self.counts.add(PageCounts(0, meta.whole_rows, meta.whole_pages, meta.whole_pages))
        if meta.sparse is None:
            return parent(layer, query, key, value, kv_cache, meta, output, output_scale, output_block_scale)
        if meta.dense is not None:
            part = query[meta.dense_rows]
            context = torch.empty_like(part)
            parent(layer, part, key, value, kv_cache, meta.dense, context, output_scale, output_block_scale)
            output[meta.dense_rows] = context
        rows = meta.sparse
        q = query[rows.rows]
        chosen = chosen_pages(q, rows, self.summaries, self.selection)
        output[rows.rows] = sparse_attention(
            q, rows.q_starts, kv_cache, rows.page_table, chosen, rows.kv_lens, self.selection.unit, self.scale, True
        )
        self.counts.add(PageCounts(len(rows.kv_lens), 0, rows.pages_read, rows.pages_seen))
        return output
