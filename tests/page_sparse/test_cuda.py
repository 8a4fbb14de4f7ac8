"""The CUDA backend's bookkeeping on a CPU. A reference implementation replaces vLLM's FlashAttention, and CPU paths
replace the page kernels, so the routing of rows is tested without a GPU."""

from itertools import permutations
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts
from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.page_sparse.steps import (
    BLOCK,
    DIM,
    STEP,
    Batch,
    assert_sparse_where_choosing,
    causal_attention,
    dense,
)
from vllm_dlm.page_sparse import cuda
from vllm_dlm.page_sparse.summaries import empty_summaries
from vllm_dlm.plugins.selection.unique import Unique

FOUR = Unique(page_size=16, budget_tokens=64, min_context=0)
#: maximum number of keys of a request
LONGEST = 10 * BLOCK


@pytest.fixture
def without_gpu(monkeypatch):
    def build(self, common_prefix_len, common, fast_build=False):
        return flash_attn.FlashAttentionMetadata(
            common.num_actual_tokens,
            common.max_query_len,
            common.query_start_loc,
            common.max_seq_len,
            common.seq_lens,
            common.block_table_tensor,
            common.slot_mapping,
        )

    def forward(self, layer, query, key, value, kv_cache, meta, output, *rest):
        counts, lens = meta.query_start_loc.diff().tolist(), meta.seq_lens.tolist()
        n = sum(counts)
        output[:n] = causal_attention(query[:n], kv_cache, list(meta.block_table), counts, lens, self.scale)
        return output

    monkeypatch.setattr(flash_attn.FlashAttentionMetadataBuilder, "build", build)
    monkeypatch.setattr(flash_attn.FlashAttentionImpl, "forward", forward)


def builder_for(batch, selection):
    builder = cuda.SelectingFlashBuilder.__new__(cuda.SelectingFlashBuilder)
    builder.selection, builder.block_size, builder.device = selection, BLOCK, torch.device("cpu")
    builder.layer_names, builder.counts = ["layer"], cuda.PageCounts()
    builder.single_rows = cuda.SingleRows(selection, 8, LONGEST, BLOCK // selection.unit, builder.device)
    builder.prompt_lens = lambda common: batch.prompts
    return builder


def described(batch, selection):
    summaries = empty_summaries(batch.pages, selection)
    selection.store(batch.pages, batch.full_before, summaries)
    return summaries


def forward(batch, selection, summaries, meta):
    impl = cuda.SelectingFlashImpl.__new__(cuda.SelectingFlashImpl)
    impl.summaries, impl.selection, impl.scale = summaries, selection, DIM**-0.5
    impl.kv_sharing_target_layer_name = None
    out = torch.full_like(batch.q, torch.nan)
    return impl.forward(None, batch.q, batch.q, batch.q, batch.pages, meta, out)


def run(batch, selection):
    builder, summaries = builder_for(batch, selection), described(batch, selection)
    meta = builder.build(0, batch.common)
    return forward(batch, selection, summaries, meta), builder.counts, meta


@pytest.mark.parametrize("step", [STEP, STEP[1:2], STEP[:1] + STEP[2:3], STEP[::-1]])
def test_a_budget_of_all_pages(without_gpu, step):
    """Rows use FlashAttention's replacement, or the page kernels if all of them are single rows."""
    batch = Batch(step)
    out, counts, meta = run(batch, Unique(page_size=16, budget_tokens=4096, min_context=0))
    torch.testing.assert_close(out, dense(batch), atol=2e-5, rtol=2e-5)
    assert meta.sparse is None or batch.common.max_query_len == 1
    assert counts.sparse_rows == 0


def test_every_row_arrives_and_sparse_ones_choose(without_gpu):
    batch = Batch(STEP)
    out, counts, meta = run(batch, FOUR)
    assert_sparse_where_choosing(batch, out)
    assert (counts.sparse_rows, counts.dense_rows) == (9, 1)
    assert counts.pages_read == 9 * 4 + 2
    filled = meta.full_pages[meta.full_pages >= 0]
    assert len(filled) == sum(n // 16 - (n - count) // 16 for count, n, _ in STEP)
    ends = {
        int(row[p // BLOCK]) * 2 + p // 16 % 2
        for (count, n, _), row in zip(STEP, batch.table, strict=True)
        for p in range(n - count, n)
        if p % 16 == 15
    }
    assert set(filled.tolist()) == ends
    # most rows complete no page, and no programs are launched for them
    assert len(meta.full_pages) <= sum(-(-count // 16) for count, _, _ in STEP)


def test_rows_are_what_they_are_alone(without_gpu):
    """The last position of a request with draft tokens equals the decoding step without them."""
    batch = Batch(STEP)
    out, _, _ = run(batch, FOUR)
    batch.common.query_start_loc = torch.tensor([0, 1], dtype=torch.int32)
    batch.common.query_start_loc_cpu = batch.common.query_start_loc
    batch.common.num_reqs = batch.common.num_actual_tokens = batch.common.max_query_len = 1
    batch.common.seq_lens = batch.common.seq_lens_cpu_upper_bound = torch.tensor([203], dtype=torch.int32)
    batch.common.block_table_tensor, batch.common.slot_mapping = batch.table[5:], batch.common.slot_mapping[-1:]
    batch.prompts, batch.q = [190], batch.q[-1:]
    alone, _, _ = run(batch, FOUR)
    torch.testing.assert_close(alone[0], out[-1], atol=1e-6, rtol=1e-6)


def test_pages_lie_in_one_piece_whatever_the_other_layers_would_like():
    """vLLM chooses the layout for a model with FlashAttention in its first layers."""
    for backends in permutations((flash_attn.FlashAttentionBackend, cuda.SelectingFlashBackend)):
        assert get_supported_kv_cache_layouts(backends) == [KVCacheLayout.LBHNC]


def test_dense_rows_are_launched_as_outside_of_graphs(monkeypatch):
    """vLLM's builder is initialized while full CUDA graphs are still enabled."""

    def init(self, *_):
        self.use_full_cuda_graph, self.max_num_splits, self.supports_draft_decode_metadata_update = True, 32, True

    monkeypatch.setattr(flash_attn.FlashAttentionMetadataBuilder, "__init__", init)
    monkeypatch.setattr(cuda, "selection_of", lambda config: FOUR)
    monkeypatch.setattr(cuda.SelectingFlashBuilder, "block_size", BLOCK, raising=False)
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=2), model_config=SimpleNamespace(max_model_len=LONGEST)
    )
    builder = cuda.SelectingFlashBuilder(None, [], config, torch.device("cpu"))
    assert not builder.use_full_cuda_graph and builder.max_num_splits == 0
