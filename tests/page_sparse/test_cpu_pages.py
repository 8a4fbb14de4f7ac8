"""The CPU backend over vLLM's packed cache: layout, bookkeeping, and exactness against vLLM's own attention."""

from types import SimpleNamespace

import pytest
import torch

from tests.page_sparse.steps import (
    BLOCK,
    CHOOSING,
    DIM,
    HEADS,
    KV_HEADS,
    PAGE,
    STEP,
    Batch,
    assert_sparse_where_choosing,
    dense,
)
from vllm_dlm.page_sparse import cpu, cpu_pages
from vllm_dlm.page_sparse.cpu_pages import packed_pages
from vllm_dlm.page_sparse.page_counts import PageCounts
from vllm_dlm.page_sparse.queries import pages_to_read
from vllm_dlm.page_sparse.summaries import empty_summaries
from vllm_dlm.plugins.selection.unique import Unique

FOUR = Unique(page_size=PAGE, budget_tokens=64, min_context=0)
EVERY = Unique(page_size=PAGE, budget_tokens=4096, min_context=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("page", [16, 32, 64, 128])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_keys_come_back(dtype, page, dim):
    pages = packed_pages(8, 2, dim, dtype, page)
    cache = torch.full((3, 2, 2 * page, 2 * dim), torch.nan, dtype=dtype)
    keys, values = torch.randn(2, 4 * page, 2, dim).to(dtype)
    order = torch.randperm(4)  # pages 0 … 3 of six
    slots = (order[:, None] * page + torch.arange(page)).flatten()
    pages.write(keys, values, cache, slots)
    pages.write(-keys, -values, cache, torch.full_like(slots, -1))
    assert torch.equal(pages.keys(cache, order), keys.unflatten(0, (4, page)).transpose(1, 2))
    assert pages.keys(cache, torch.tensor([4, 5])).isnan().all()


def run(batch: Batch, selection):
    """Runs the backend on a packed copy of the batch's cache without the step's keys."""
    pages = packed_pages(HEADS, KV_HEADS, DIM, torch.float32, PAGE)
    cache = torch.full_like(batch.pages, torch.nan)
    slots = torch.arange(len(cache) * BLOCK)
    keys, values = batch.pages.transpose(1, 2).flatten(0, 1).chunk(2, -1)  # [slots, Hkv, D] each
    new = batch.common.slot_mapping
    earlier = ~torch.isin(slots, new)
    pages.write(keys[earlier], values[earlier], cache, slots[earlier])

    builder = cpu.SelectingCPUBuilder.__new__(cpu.SelectingCPUBuilder)
    builder.selection, builder.pages, builder.pages_per_block = selection, pages, BLOCK // PAGE
    builder.layer_names, builder.counts = ["layer"], PageCounts()
    builder.prompt_lens = lambda common: batch.prompts
    meta = builder.build(0, batch.common)
    impl = cpu.SelectingCPUImpl(HEADS, DIM, DIM**-0.5, KV_HEADS)
    impl.summaries, impl.selection = empty_summaries(cache, selection), selection
    impl.describe(cache, batch.full_before)
    out = torch.full_like(batch.q, torch.nan)
    impl.forward(None, batch.q, keys[new], values[new], cache, meta, out)
    return out, impl, meta, builder.counts


@pytest.mark.parametrize("step", [STEP, STEP[1:2], STEP[:1] + STEP[2:3], STEP[::-1]])
def test_a_budget_of_all_pages(step):
    batch = Batch(step)
    out, _, meta, counts = run(batch, EVERY)
    torch.testing.assert_close(out, dense(batch), atol=2e-5, rtol=2e-5)
    assert not meta.sparse and counts.sparse_rows == 0


def test_every_row_arrives_and_sparse_ones_choose():
    batch = Batch(STEP)
    out, _, meta, counts = run(batch, FOUR)
    assert_sparse_where_choosing(batch, out)
    assert counts == PageCounts(9, 1, 9 * 4 + 2, counts.pages_seen)
    assert len(meta.full_pages) == sum(n // PAGE - (n - count) // PAGE for count, n, _ in STEP)


def test_chosen_pages_are_read_and_no_others():
    """Compares with attention in float64 over the plain cache and the pages that the backend chose."""
    batch = Batch(STEP)
    out, impl, meta, _ = run(batch, FOUR)
    ((rows, _),) = meta.sparse
    chosen = pages_to_read(batch.q[rows.rows], rows, impl.summaries, FOUR, batch.pages)
    for i, row in enumerate(CHOOSING):
        for head in range(KV_HEADS):
            physical = rows.page_table[i, chosen[i, head].long()].long()
            kv = batch.pages.unflatten(2, (-1, PAGE)).transpose(1, 2).flatten(0, 1)[physical, head].flatten(0, 1)
            count = 4 * PAGE - int(-rows.kv_lens[i] % PAGE)
            kv = kv[:count].double()
            q = batch.q[row].unflatten(0, (KV_HEADS, -1))[head].double()
            want = (q @ kv[:, :DIM].T * DIM**-0.5).softmax(-1) @ kv[:, DIM:]
            got = out[row].unflatten(0, (KV_HEADS, -1))[head]
            torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choosing_all_pages_is_vllm_bit_for_bit(dtype, monkeypatch):
    """Passing each head as a separate request with its own page table gives the same sums in the same order, as long as
    vLLM does not split a head's keys among threads."""
    monkeypatch.setattr(cpu_pages, "envs", SimpleNamespace(VLLM_CPU_ATTN_SPLIT_KV=False))
    torch.manual_seed(0)
    pages = packed_pages(8, 2, 64, dtype, 32)
    cache = torch.zeros(20, 2, 64, 128, dtype=dtype)
    keys, values = torch.randn(2, 20 * 64, 2, 64).to(dtype)
    pages.write(keys, values, cache, torch.arange(20 * 64))
    lens = torch.tensor([300, 289, 320], dtype=torch.int32)  # ten pages each
    table = torch.stack([torch.randperm(40)[:10] for _ in lens]).to(torch.int32)
    q = torch.randn(3, 8, 64).to(dtype)
    want = torch.empty_like(q)
    pages.attend(q, cache, pages.batch([1, 1, 1], lens, table), 0.125, want)
    got = pages.attend_chosen(q, cache, pages.chosen_batch(lens, 10), table[:, None].expand(-1, 2, -1), 0.125)
    assert torch.equal(got, want)
    monkeypatch.undo()
    pages.attend(q, cache, pages.batch([1, 1, 1], lens, table), 0.125, want)
    tolerance = 2e-6 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    few = table[:, None, 5:].expand(-1, 2, -1)
    assert not torch.equal(pages.attend_chosen(q, cache, pages.chosen_batch(lens, 5), few, 0.125), want)


def test_more_forced_pages_than_the_budget():
    """Pages without summaries are forced. The page being written is read even if forced pages exceed the budget."""
    batch = Batch([(1, 150, 100)])
    batch.full_before = batch.full_before[:0]
    out, impl, meta, _ = run(batch, FOUR)
    ((rows, _),) = meta.sparse
    assert pages_to_read(batch.q, rows, impl.summaries, FOUR, batch.pages)[0, 0].tolist() == [
        0,
        1,
        2,
        9,
    ]  # ties: the first ones
    table = rows.page_table[0, [0, 1, 2, 9]].long()
    kv = batch.pages.unflatten(2, (-1, PAGE)).transpose(1, 2).flatten(0, 1)[table].transpose(0, 1).flatten(1, 2)
    kv = kv[:, : 48 + 6].double()  # [Hkv, keys, 2 * D]
    q = batch.q[0].unflatten(0, (KV_HEADS, -1)).double()
    want = (q @ kv[..., :DIM].transpose(1, 2) * DIM**-0.5).softmax(-1) @ kv[..., DIM:]
    torch.testing.assert_close(out[0].double(), want.flatten(0, 1), atol=2e-6, rtol=2e-6)


def test_rows_are_what_they_are_alone():
    batch = Batch(STEP)
    together, _, _, _ = run(batch, FOUR)
    for i, (first, request) in enumerate([(40, 1), (167, 5)]):
        alone = Batch(STEP)
        count, keys, prompt = STEP[request]
        common = alone.common
        common.query_start_loc = common.query_start_loc_cpu = torch.tensor([0, count], dtype=torch.int32)
        common.num_reqs, common.num_actual_tokens = 1, count
        common.seq_lens = torch.tensor([keys], dtype=torch.int32)
        common.block_table_tensor = alone.table[request : request + 1]
        common.slot_mapping = common.slot_mapping[first : first + count]
        alone.prompts, alone.q = [prompt], alone.q[first : first + count]
        out, _, _, _ = run(alone, FOUR)
        assert torch.equal(out, together[first : first + count]), i
