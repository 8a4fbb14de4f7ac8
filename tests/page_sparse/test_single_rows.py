"""Steps with one row per request on CUDA, which vLLM captures as CUDA graphs. The bookkeeping runs on a CPU, with naive
page kernels. A replay is simulated by a forward with the captured metadata after another step was built."""

import pytest
import torch
from vllm.v1.attention.backend import AttentionCGSupport

from tests.kernels.launches import Launching
from tests.page_sparse.steps import BLOCK, DIM, HEADS, PAGE, Batch, dense
from tests.page_sparse.test_cuda import FOUR, LONGEST, builder_for, described, forward, run, without_gpu  # noqa: F401
from vllm_dlm.kernels.sparse_attention import naive, sparse_attention
from vllm_dlm.page_sparse import cuda
from vllm_dlm.page_sparse.page_counts import PageCounts
from vllm_dlm.page_sparse.partition import pages_of
from vllm_dlm.page_sparse.summaries import empty_summaries
from vllm_dlm.plugins.selection.unique import Unique

#: (rows, keys, prompt): long contexts, the last token of a long prompt, a short context, ends of pages
SINGLES = [(1, 150, 100), (1, 290, 290), (1, 30, 20), (1, 160, 159), (1, 64, 10), (1, 203, 190)]
WHOLE, SPARSE = [1, 2, 4], [0, 3, 5]
OTHERS = [(1, 33, 20), (1, 210, 100), (1, 96, 1), (1, 16, 15), (1, 320, 320), (1, 65, 64)]


@pytest.fixture(autouse=True)
def defined(without_gpu, monkeypatch):  # noqa: F811
    monkeypatch.setattr(cuda, "sparse_attention", naive.sparse_attention)


def padded(step, count: int) -> Batch:
    """A batch with `count` dummy requests, as vLLM pads a step to the size of a CUDA graph."""
    batch = Batch(step)
    common, more = batch.common, torch.zeros(count, dtype=torch.int32)
    common.query_start_loc_cpu = common.query_start_loc = torch.cat([common.query_start_loc, more + len(step)])
    common.seq_lens = common.seq_lens_cpu_upper_bound = torch.cat([common.seq_lens, more])
    common.slot_mapping = torch.cat([common.slot_mapping, more - 1])
    common.block_table_tensor = torch.cat([batch.table, more[:, None].expand(-1, batch.table.shape[1])])
    common.num_reqs, common.num_actual_tokens = len(step) + count, len(step) + count
    batch.q = torch.cat([batch.q, torch.randn(count, HEADS, DIM)])
    return batch


@pytest.mark.parametrize("selection", [FOUR, Unique(page_size=PAGE, budget_tokens=96, min_context=140)])
def test_what_reads_everything_is_dense_and_the_others_choose(selection):
    batch = padded(SINGLES, 2)
    out, counts, meta = run(batch, selection)
    assert meta.dense is None
    want = dense(Batch(SINGLES))
    torch.testing.assert_close(out[WHOLE], want[WHOLE], atol=2e-6, rtol=2e-6)
    assert ((out[SPARSE] - want[SPARSE]).abs().amax((1, 2)) > 1e-3).all()
    assert (out[len(SINGLES) :] == 0).all()  # dummy requests; vLLM ignores their outputs
    read = len(SPARSE) * selection.kept_pages + pages_of([30, 64], PAGE)
    assert counts == PageCounts(3, 2, read, pages_of([30, 64, 150, 160, 203], PAGE))


def test_a_row_is_what_it_is_in_a_mixed_step():
    """In a mixed step, a prompt is in the batch and no CUDA graph is used."""
    alone, _, _ = run(Batch(SINGLES), FOUR)
    batch = Batch([*SINGLES, (20, 90, 200)])
    batch.q[: len(SINGLES)] = Batch(SINGLES).q
    known = {i: batch.table[i, :10] for i in range(len(SINGLES))}
    single = Batch(SINGLES)
    for i, (_, keys, _) in enumerate(SINGLES):  # the same keys in other blocks
        n = -(-keys // BLOCK)
        batch.pages[known[i][:n].long()] = single.pages[single.table[i, :n].long()]
    mixed, _, meta = run(batch, FOUR)
    assert meta.dense is not None
    torch.testing.assert_close(mixed[: len(SINGLES)], alone, atol=2e-6, rtol=2e-6)


def tensors(meta) -> list[int]:
    rows = meta.sparse
    held = (rows.q_starts, rows.page_table, rows.kv_lens, rows.num_pages, rows.recent, meta.full_pages)
    return [tensor.data_ptr() for tensor in held]


def test_a_replay_reads_what_the_last_step_wrote():
    first = padded(SINGLES, 2)
    builder = builder_for(first, FOUR)
    captured = builder.build_for_cudagraph_capture(first.common)
    assert builder.counts == PageCounts()
    for step in (OTHERS, SINGLES, OTHERS[::-1]):
        batch = padded(step, 2)
        builder.prompt_lens = lambda common, batch=batch: batch.prompts
        built, summaries = builder.build(0, batch.common), described(batch, FOUR)
        assert tensors(built) == tensors(captured)
        counted = PageCounts(**vars(builder.counts))
        out = forward(batch, FOUR, summaries, captured)
        assert builder.counts == counted  # a replay does not run the builder
        whole = torch.tensor([keys <= 64 or keys <= prompt for _, keys, prompt in step])
        torch.testing.assert_close(out[:6][whole], dense(Batch(step))[whole], atol=2e-6, rtol=2e-6)
        assert torch.equal(out, run(batch, FOUR)[0])


def test_pages_that_are_filled_are_described():
    batch = padded(SINGLES, 2)
    builder, summaries = builder_for(batch, FOUR), described(batch, FOUR)
    meta = builder.build(0, batch.common)
    ends = [int(batch.table[i, (keys - 1) // BLOCK]) * 2 + (keys - 1) // PAGE % 2 for i, keys in ((3, 160), (4, 64))]
    assert sorted(meta.full_pages.tolist()) == sorted([-1] * 6 + ends)
    assert summaries.second[ends].isinf().all()
    forward(batch, FOUR, summaries, meta)
    assert summaries.second[ends].isfinite().all()


def test_only_single_rows_are_kept_as_graphs():
    assert cuda.SelectingFlashBuilder.get_cudagraph_support(None, None) is (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )
    batch = Batch([(2, 150, 100)])
    with pytest.raises(NotImplementedError):
        builder_for(batch, FOUR).build_for_cudagraph_capture(batch.common)


def test_who_chooses_is_known_without_the_device():
    batch = padded(SINGLES, 2)
    common, builder, asked = batch.common, builder_for(batch, FOUR), []
    common.seq_lens = common.query_start_loc = common.slot_mapping = common.block_table_tensor = None
    builder._single_rows = lambda common, choosing: asked.append(choosing)
    builder.build(0, common)
    assert asked == [set(SPARSE)]


def test_nothing_waits_for_the_device(monkeypatch):
    """Uses tensors without contents that claim to be on a GPU, so reading a value fails."""
    triton = pytest.importorskip("triton")
    launched = []
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", lambda kernel, *_, **__: launched.append(kernel))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.is_meta))
    monkeypatch.setattr(cuda, "sparse_attention", sparse_attention)
    batch = padded(SINGLES, 2)
    builder = builder_for(batch, FOUR)
    for name in ("query_start_loc", "seq_lens", "slot_mapping", "block_table_tensor"):
        setattr(batch.common, name, getattr(batch.common, name).to("meta"))
    batch.pages, batch.q = batch.pages.to("meta"), batch.q.to("meta")
    builder.single_rows = cuda.SingleRows(FOUR, 8, LONGEST, BLOCK // PAGE, torch.device("meta"))
    meta = builder._single_rows(batch.common, set(SPARSE))
    with Launching():
        out = forward(batch, FOUR, empty_summaries(batch.pages, FOUR), meta)
    assert out.is_meta and out.shape == batch.q.shape
    assert [kernel.__name__ for kernel in launched] == [
        "_statistics_kernel",
        "_score_kernel",
        "_top_kernel",
        "_attend_kernel",
        "_merge_kernel",
    ]
    with pytest.raises(RuntimeError):
        meta.sparse.num_pages.max().item()
