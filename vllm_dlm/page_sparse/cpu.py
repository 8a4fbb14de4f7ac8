"""Attention backend for CPUs: vLLM's attention kernels over all pages or over chosen pages.

Read in vLLM 0.32: v1/attention/backends/cpu_attn.py, v1/attention/backend.py
(builder and implementation), model_executor/layers/attention/attention.py.
"""

from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.utils import get_num_attention_heads_from_layers

from vllm_dlm.configuration import selection_of
from vllm_dlm.kernels.top_pages import physical_pages
from vllm_dlm.page_sparse.cpu_pages import Batch, PackedPages, packed_pages
from vllm_dlm.page_sparse.page_counts import PageCounts
from vllm_dlm.page_sparse.partition import Partition, partition, prompt_lengths
from vllm_dlm.page_sparse.queries import Queries, make_queries, page_table, pages_to_read, place
from vllm_dlm.plugins.selection.base import Summaries
from vllm_dlm.plugins.selection.pages import PageSelection

#: generated positions whose pages are scored at once
PIECE = 32


class SelectingCPUBackend(CPUAttentionBackend):
    # Writing keys, summarizing full pages and attention use the same metadata.
    forward_includes_kv_cache_update: bool = True

    @staticmethod
    def get_name() -> str:
        return "DLM_SELECTING_CPU"

    @staticmethod
    def get_impl_cls() -> type["SelectingCPUImpl"]:
        return SelectingCPUImpl

    @staticmethod
    def get_builder_cls() -> type["SelectingCPUBuilder"]:
        return SelectingCPUBuilder


@dataclass
class WholeReaders:
    """Queries that read everything: prompts, and generated positions with short contexts."""

    rows: slice | torch.Tensor
    batch: Batch


@dataclass
class SelectingCPUMetadata:
    slots: torch.Tensor  # [T] cache slots of the step's tokens, below 0 for padding
    full_pages: torch.Tensor  # [m] pages whose last position is written in this step
    dense: WholeReaders | None
    sparse: list[tuple[Queries, Batch]]


class SelectingCPUBuilder(AttentionMetadataBuilder[SelectingCPUMetadata]):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.selection = selection_of(vllm_config)
        self.pages_per_block = kv_cache_spec.block_size // self.selection.unit
        heads = get_num_attention_heads_from_layers(vllm_config, layer_names)
        self.pages = packed_pages(
            heads, kv_cache_spec.num_kv_heads, kv_cache_spec.head_size, kv_cache_spec.dtype, self.selection.unit
        )
        #: metadata of a step -> prompt length of each request; the worker sets this and collects the counts
        self.prompt_lens = lambda common: None
        self.counts = PageCounts()

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> SelectingCPUMetadata:
        common, size = common_attn_metadata, self.selection.unit
        if common.causal is not True:
            raise NotImplementedError("dlm.selection: attention that is not causal is not supported")
        starts, kv_lens = common.query_start_loc_cpu.tolist(), common.seq_lens.tolist()
        slots = common.slot_mapping[: starts[common.num_reqs]].long()
        plan = partition(self.selection, starts, kv_lens, prompt_lengths(common, self.prompt_lens(common)))
        self.counts.add(plan.counts(self.selection), len(self.layer_names))
        table = common.block_table_tensor
        return SelectingCPUMetadata(
            slots=slots,
            full_pages=slots[(slots >= 0) & (slots % size == size - 1)] // size,
            dense=self._dense(plan, table) if plan.prompt or plan.whole else None,
            sparse=self._sparse(plan, table),
        )

    def _dense(self, plan: Partition, table: torch.Tensor) -> WholeReaders:
        requests, counts, keys, rows = plan.dense()
        pages = -(-max(keys) // self.selection.unit)
        blocks = -(-pages // self.pages_per_block)
        batch = self.pages.batch(
            counts, torch.tensor(keys, dtype=torch.int32), page_table(table[requests], blocks, self.pages_per_block)
        )
        return WholeReaders(place(rows, table.device), batch)

    def _sparse(self, plan: Partition, table: torch.Tensor) -> list[tuple[Queries, Batch]]:
        pieces = []
        for i in range(0, len(plan.sparse), PIECE):
            requests, rows, keys = map(list, zip(*plan.sparse[i : i + PIECE], strict=True))
            lens = torch.tensor(keys, dtype=torch.int32)
            made = make_queries(self.selection, rows, lens, keys, table[requests], self.pages_per_block)
            pieces.append((made, self.pages.chosen_batch(lens, self.selection.kept_pages)))
        return pieces


class SelectingCPUImpl(AttentionImpl):
    selection: PageSelection  # set when the layer is built (layer_backends.py)
    summaries: Summaries | None = None  # set when the KV cache is allocated (summaries.py)

    def __init__(
        self,
        num_heads,
        head_size,
        scale,
        num_kv_heads,
        alibi_slopes=None,
        sliding_window=None,
        kv_cache_dtype="auto",
        logits_soft_cap=None,
        attn_type="decoder",
        kv_sharing_target_layer_name=None,
    ):
        # Unsupported arguments have been rejected in layer_backends.py.
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.sliding_window = sliding_window
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ):
        """query and output [T, H, D], key and value [T, Hkv, D], kv_cache [blocks, Hkv, block_size, 2 * D]"""
        meta: SelectingCPUMetadata | None = attn_metadata
        if meta is None or self.summaries is None:  # profiling
            return output.fill_(0)
        selection, pages = self.selection, self.pages(kv_cache)
        if key is not None and self.kv_sharing_target_layer_name is None:
            count = len(meta.slots)
            pages.write(key[:count], value[:count], kv_cache, meta.slots)
            self.describe(kv_cache, meta.full_pages)
        if meta.dense:
            rows = meta.dense.rows
            if isinstance(rows, slice):
                pages.attend(query[rows], kv_cache, meta.dense.batch, self.scale, output[rows])
            else:
                context = torch.empty_like(output[rows])
                pages.attend(query[rows], kv_cache, meta.dense.batch, self.scale, context)
                output[rows] = context
        for rows, batch in meta.sparse:
            q = query[rows.rows]
            chosen = pages_to_read(q, rows, self.summaries, selection, pages.cache(kv_cache))
            physical = physical_pages(rows.page_table, chosen)
            output[rows.rows] = pages.attend_chosen(q, kv_cache, batch, physical, self.scale)
        return output

    def pages(self, kv_cache: torch.Tensor) -> PackedPages:
        return packed_pages(self.num_heads, self.num_kv_heads, self.head_size, kv_cache.dtype, self.selection.unit)

    def describe(self, kv_cache: torch.Tensor, page_ids: torch.Tensor) -> None:
        """Summarizes pages [n] from their current keys, which are packed."""
        if self.summaries is not None and len(page_ids):
            self.selection.put(self.pages(kv_cache).keys(kv_cache, page_ids), page_ids, self.summaries)
