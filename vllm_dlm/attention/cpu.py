"""The backend on CPUs: a plain cache that can be read back, torch's fused attention, page kernels.

vLLM's own CPU kernel packs keys for the instruction set, so that pages could
not be gathered from it. Layers that read everything keep it.

Read in vLLM 0.32: v1/attention/backends/cpu_attn.py, v1/attention/backend.py
(builder and implementation), model_executor/layers/attention/attention.py.
"""

from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from vllm_dlm.attention.counts import PageCounts
from vllm_dlm.attention.plan import plan_step, prompt_lengths
from vllm_dlm.attention.rows import Rows, attend_all, attend_chosen, make_rows
from vllm_dlm.integration.autoregressive import selection_of
from vllm_dlm.kernels.causal_attention import causal_attention
from vllm_dlm.kernels.haar_pyramid import store_statistics

#: generated positions whose pages are scored and gathered at once
PIECE = 32


class SelectingCPUBackend(CPUAttentionBackend):
    # Writing keys, describing full pages and attending need the same metadata.
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
class SelectingCPUMetadata:
    num_actual_tokens: int
    written: torch.Tensor | None  # [n] the step's rows that have a slot; None: all
    slots: torch.Tensor  # [n * Hkv] where their heads lie in the cache seen as rows [blocks * Hkv * block_size, 2 * D]
    full_pages: torch.Tensor  # [m] pages whose last position is written in this step
    prompt: list[tuple[slice, torch.Tensor, int]]  # rows, blocks and keys of each request's part of a prompt
    whole: list[Rows]
    sparse: list[Rows]


class SelectingCPUBuilder(AttentionMetadataBuilder[SelectingCPUMetadata]):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.selection = selection_of(vllm_config)
        self.block_size = kv_cache_spec.block_size
        self.kv_heads = kv_cache_spec.num_kv_heads
        #: metadata of a step -> prompt length of each of its requests; the worker knows
        self.prompt_lens = lambda common: None

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> SelectingCPUMetadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError("dlm.selection: attention that is not causal is not supported")
        starts, kv_lens = common.query_start_loc_cpu.tolist(), common.seq_lens.tolist()
        slots, written = common.slot_mapping[: starts[common.num_reqs]].long(), None
        if len(slots) and int(slots.min()) < 0:
            written = (slots >= 0).nonzero()[:, 0]
            slots = slots[written]
        plan = plan_step(self.selection, starts, kv_lens, prompt_lengths(common, self.prompt_lens(common)))
        table = common.block_table_tensor
        size = self.selection.page_size
        head = torch.arange(self.kv_heads)
        block, offset = slots // self.block_size, slots % self.block_size
        return SelectingCPUMetadata(
            num_actual_tokens=starts[common.num_reqs],
            written=written,
            slots=((block[:, None] * self.kv_heads + head) * self.block_size + offset[:, None]).flatten(),
            full_pages=slots[slots % size == size - 1] // size,
            prompt=[(slice(first, first + count), table[r], keys) for r, first, count, keys in plan.prompt],
            whole=self._pieces(plan.whole, table, True),
            sparse=self._pieces(plan.sparse, table, False),
        )

    def _pieces(self, wanted, table, read_all: bool) -> list[Rows]:
        pieces = []
        for i in range(0, len(wanted), PIECE):
            requests, rows, keys = map(list, zip(*wanted[i : i + PIECE], strict=True))
            pages = sum(-(-n // self.selection.page_size) for n in keys)
            pieces.append(
                make_rows(
                    self.selection, rows, torch.tensor(keys, dtype=torch.int32), max(keys), table[requests],
                    self.block_size // self.selection.page_size, pages, read_all,
                )  # fmt: skip
            )
        return pieces


class SelectingCPUImpl(AttentionImpl):
    def __init__(
        self, num_heads, head_size, scale, num_kv_heads, alibi_slopes=None, sliding_window=None, kv_cache_dtype="auto",
        logits_soft_cap=None, attn_type="decoder", kv_sharing_target_layer_name=None,
    ):  # fmt: skip
        # What this cannot compute was refused by whoever chose it (layers.py).
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.sliding_window = sliding_window
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.statistics = None  # hung here once the cache is allocated
        self.counts = PageCounts()
        self.selection = None

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ):
        """query and output [T, H, D], key and value [T, Hkv, D], kv_cache [blocks, Hkv, block_size, 2 * D]"""
        meta: SelectingCPUMetadata | None = attn_metadata
        if meta is None or self.statistics is None:  # profiling
            return output.fill_(0)
        if key is not None and self.kv_sharing_target_layer_name is None:
            self._write(key, value, kv_cache, meta)
        selection = self.selection
        if meta.prompt:
            rows = [rows for rows, _, _ in meta.prompt]
            tables, kv_lens = [table for _, table, _ in meta.prompt], [keys for _, _, keys in meta.prompt]
            for own, table, keys in zip(rows, tables, kv_lens, strict=True):
                count = own.stop - own.start
                output[own] = causal_attention(query[own], kv_cache, [table], [count], [keys], self.scale)
        for rows in meta.whole:
            output[rows.rows] = attend_all(query[rows.rows], rows, kv_cache, selection.page_size, self.scale)
            self.counts.add(PageCounts(0, len(rows.kv_lens), rows.pages_read, rows.pages_seen))
        for rows in meta.sparse:
            chosen = attend_chosen(query[rows.rows], rows, kv_cache, self.statistics, selection, self.scale)
            output[rows.rows] = chosen
            self.counts.add(PageCounts(len(rows.kv_lens), 0, rows.pages_read, rows.pages_seen))
        return output

    def _write(self, key, value, kv_cache, meta) -> None:
        key, value = key[: meta.num_actual_tokens], value[: meta.num_actual_tokens]
        if meta.written is not None:
            key, value = key[meta.written], value[meta.written]
        cache = kv_cache.view(-1, 2 * self.head_size)
        cache.index_copy_(0, meta.slots, torch.cat([key, value], -1).flatten(0, 1))
        if len(meta.full_pages):
            store_statistics(kv_cache, meta.full_pages, self.statistics)
