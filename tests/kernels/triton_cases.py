"""The kernels of page-sparse attention against their definitions, with Triton's interpreter; run by
test_triton_interpreter.py."""

import pytest
import torch

from tests.kernels.devices import on_gpu
from tests.kernels.interpreted import *  # noqa: F403
from tests.kernels.pages import PagedBatch, scored
from tests.tiers import in_turn, slow
from vllm_dlm.kernels.haar_pyramid import (
    INVALID,
    STD_KINDS,
    PageStatistics,
    spread_width,
    store_statistics,
)
from vllm_dlm.kernels.page_scores import FORCED, LOWEST, REDUCTIONS, page_scores
from vllm_dlm.kernels.page_scores import naive as naive_scores
from vllm_dlm.kernels.page_scores import triton as scores_of
from vllm_dlm.kernels.sparse_attention import naive as naive_attention
from vllm_dlm.kernels.sparse_attention import sparse_attention
from vllm_dlm.kernels.sparse_attention import triton as attention
from vllm_dlm.kernels.top_pages import naive as naive_top
from vllm_dlm.kernels.top_pages import top_pages
from vllm_dlm.kernels.top_pages import triton as top
from vllm_dlm.kernels.triton_utils import UPCAST

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def test_the_interpreter_runs():
    assert UPCAST.value


@pytest.mark.parametrize("std_kind", STD_KINDS)
@pytest.mark.parametrize("nodes, dim, dtype", [(1, 80, torch.bfloat16), (4, 66, torch.float32)])
def test_statistics(std_kind, nodes, dim, dtype):
    """Ids below 0 are skipped, and pages that are not listed are unchanged."""
    batch = PagedBatch([100, 64], [1, 1], dim=dim, dtype=dtype)
    got = PageStatistics.empty(batch.pages, 16, std_kind, nodes)
    want = PageStatistics.empty(batch.pages, 16, std_kind, nodes)
    page_ids = batch.full_pages[1:].clone()
    store_statistics(batch.pages, page_ids, want)
    store_statistics(on_gpu(batch.pages), torch.cat([page_ids, torch.tensor([-1, -5])]).to(torch.int32), got)
    torch.testing.assert_close(got.mean, want.mean)
    torch.testing.assert_close(got.spread, want.spread, atol=1e-6, rtol=1e-5)
    assert (got.spread[batch.full_pages[0]] == INVALID).all()


def test_statistics_of_a_cache_with_other_strides():
    """A cache that stores the keys of all heads of a position next to each other."""
    batch = PagedBatch([64], [1], dtype=torch.float16)
    got, want = PageStatistics.empty(batch.pages, 16, "l2"), batch.statistics("l2")
    store_statistics(on_gpu(batch.pages.transpose(1, 2).contiguous().transpose(1, 2)), batch.full_pages, got)
    torch.testing.assert_close(got.mean, want.mean)
    torch.testing.assert_close(got.spread, want.spread)


@pytest.mark.parametrize("width, k", [(30, 1), (30, 5), (30, 12), (30, 40), (200, 200), (130, 129)])
def test_top_pages(width, k):
    scores = torch.randn(3, 2, width, generator=torch.Generator().manual_seed(k))
    scores[0, 0, 3:9] = scores[0, 0, 3]  # ties
    scores[0, 1, ::2] = 0.0
    scores[0, 1, 1:8:2] = -0.0  # ties with 0
    scores[1] = scores[1].round()
    scores[1, :, 20:] = -torch.inf
    scores[2, :, 4:] = -torch.inf
    scores[2, 1, :2] = FORCED
    scores[2, 1, 2], scores[2, 0, 1] = -FORCED, torch.finfo(torch.float32).min
    assert torch.equal(top_pages(on_gpu(scores), k), naive_top.top_pages(scores, k))


def test_top_pages_of_rows_longer_than_a_tile(monkeypatch):
    monkeypatch.setattr(top, "TILE", 128)
    scores = torch.randn(1, 2, 700, generator=torch.Generator().manual_seed(0))
    scores[0, 0] = scores[0, 0].round()
    scores[0, 1, 600:] = -torch.inf
    for k in (3, 300, 650):
        assert torch.equal(top_pages(on_gpu(scores), k), naive_top.top_pages(scores, k))


def test_no_page_has_a_score():
    assert (top_pages(on_gpu(torch.full((1, 1, 5), -torch.inf)), 3) == -1).all()


def beyond_means_nothing(batch):
    """Page tables with invalid entries after a request's pages, which must not be read."""
    past = torch.arange(batch.page_table.shape[1]) >= batch.num_pages[:, None]
    batch.page_table = batch.page_table.masked_fill(past, 1 << 40)


def compare_scores(batch, statistics, reduce, tolerance):
    beyond_means_nothing(batch)
    arguments = (
        on_gpu(batch.q),
        batch.q_starts,
        statistics,
        batch.page_table,
        batch.num_pages,
        batch.num_pages - 1,
        1,
        0.5,
        reduce,
    )
    got = scored(page_scores, *arguments)
    torch.testing.assert_close(
        got.double(), scored(naive_scores.page_scores, *arguments), atol=tolerance, rtol=tolerance
    )
    return got


@pytest.mark.parametrize("reduce, std_kind", in_turn(list(REDUCTIONS), list(STD_KINDS)))
def test_scores(std_kind, reduce, monkeypatch):
    """Ragged requests, groups of three heads, more rows than a tile holds, several tiles of pages."""
    monkeypatch.setattr(scores_of, "PAGES", 16)
    batch = PagedBatch([200, 331, 17], (3, 9, 1), heads=6, kv_heads=2, dim=66 if std_kind == "diag2" else 64)
    compare_scores(batch, batch.statistics(std_kind), reduce, 1e-5)


@pytest.mark.parametrize("processors", [1, 1000])
def test_normalisers_of_few_long_and_many_short_runs(processors, monkeypatch):
    monkeypatch.setattr(scores_of, "PAGES", 16)
    monkeypatch.setattr(scores_of, "processors", lambda device: processors)
    batch = PagedBatch([1300, 90], (1, 2), heads=4, kv_heads=2)
    compare_scores(batch, batch.statistics("l2"), "softmax_sum", 1e-5)


@pytest.mark.parametrize("reduce", [*REDUCTIONS[:1], *slow(*REDUCTIONS[1:])])
@pytest.mark.parametrize(
    "dtype, std_kind, dim, tolerance", [(torch.bfloat16, "vector", 128, 3e-2), (torch.float16, "l2", 80, 4e-3)]
)
def test_scores_in_half_precision(dtype, std_kind, dim, tolerance, reduce):
    batch = PagedBatch([500, 333], [1, 1], heads=8, kv_heads=2, dim=dim, dtype=dtype)
    compare_scores(batch, batch.statistics(std_kind), reduce, tolerance)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_scores_that_are_forced_broken_or_infinite(reduce):
    batch = PagedBatch([320], [2])
    statistics = batch.statistics("l2")
    invalid, broken, infinite = batch.page_table[0, [5, 7, 9]]
    statistics.spread[invalid] = torch.inf
    statistics.mean[broken, 0] = torch.nan
    got = compare_scores(batch, statistics, reduce, 1e-5)[0]
    assert (got[:, [0, 5, 19]] == FORCED).all() and got[0, 7] == LOWEST
    statistics.mean[infinite, 1, 0, 0] = torch.inf
    compare_scores(batch, statistics, reduce, 1e-5)


@pytest.mark.parametrize(
    "std_kind, reduce, forced_from",
    [("l2", "max", 35), ("rms", "softmax_sum", torch.tensor([35])), ("vector", "mean", 35), ("diag2", "max", 35)],
)
def test_scores_of_summaries_among_keys_and_values(std_kind, reduce, forced_from):
    """Summaries as a canvas stores them: head by head, mean next to spread, in the keys' dtype."""
    g = torch.Generator().manual_seed(0)
    rows, width = torch.rand(2, 37, 128, generator=g).to(torch.bfloat16), spread_width(std_kind, 64)  # [Hkv, N, 2 * D]
    q = torch.randn(5, 6, 64, generator=g).to(torch.bfloat16)
    blocks = torch.nn.functional.pad(rows, (0, 0, 0, 3)).unflatten(1, (5, 8)).transpose(0, 1)  # [5, Hkv, 8, 2 * D]
    statistics, number = (
        PageStatistics(blocks[..., :64], blocks[..., 64 : 64 + width], 16, std_kind),
        torch.tensor([37]),
    )
    arguments = torch.tensor([0, 5]), statistics, torch.arange(5)[None], number, number - 2, 1, 0.5, "max"
    got, want = (scored(page_scores, own, *arguments) for own in (on_gpu(q), q))
    torch.testing.assert_close(got, want, atol=3e-2, rtol=3e-2)


def test_pages_that_requests_share_and_requests_without_pages():
    batch = PagedBatch([128, 128, 64], [1, 1, 1])
    batch.page_table[1], batch.q[1], batch.num_pages[2] = batch.page_table[0], batch.q[0], 0
    got = compare_scores(batch, batch.statistics("rms"), "max", 1e-5)
    assert torch.equal(got[0], got[1])


def choose(batch, k):
    """[B, Hkv, k]: the first and the last pages, and random others that differ between heads"""
    g = torch.Generator().manual_seed(k)
    scores = torch.rand(len(batch.kv_lens), batch.kv_heads, batch.page_table.shape[1], generator=g)
    page = torch.arange(scores.shape[2])
    counts = batch.num_pages[:, None, None]
    scores = scores.masked_fill((page == 0) | (page >= counts - 2), FORCED).masked_fill(page >= counts, -torch.inf)
    return naive_top.top_pages(scores, k)


def compare_attention(batch, chosen, causal, tolerance=2e-5):
    beyond_means_nothing(batch)
    arguments = (
        on_gpu(batch.q),
        batch.q_starts,
        batch.pages,
        batch.page_table,
        chosen,
        batch.kv_lens,
        batch.page_size,
        batch.q.shape[2] ** -0.5,
        causal,
    )
    got = sparse_attention(*arguments)
    torch.testing.assert_close(got, naive_attention.sparse_attention(*arguments), atol=tolerance, rtol=tolerance)
    return got


@pytest.mark.parametrize("causal", [True, *slow(False)])
@pytest.mark.parametrize(
    "kv_lens, q_lens, heads, kv_heads, dim, page_size, per_block, k",
    [
        ((200,), (1,), 4, 4, 64, 16, 2, 6),
        ((200, 333, 48), (3, 1, 8), 6, 2, 80, 16, 1, 8),  # ragged, groups of three
        ((90, 700), (5, 64), 8, 1, 128, 32, 2, 7),  # more rows than a tile holds
        ((129, 70), (0, 2), 4, 2, 96, 128, 1, 2),  # a request without queries
        ((60, 41), (2, 3), 4, 2, 256, 1, 16, 24),  # single keys
        ((60, 41), (1, 1), 2, 2, 64, 2, 8, 40),  # pairs, fewer than K
    ],
)
def test_attention(kv_lens, q_lens, heads, kv_heads, dim, page_size, per_block, k, causal):
    batch = PagedBatch(kv_lens, q_lens, heads, kv_heads, dim, page_size, per_block)
    compare_attention(batch, choose(batch, k), causal)


@pytest.mark.parametrize("processors", [1, 1000])
def test_one_share_and_shares_without_keys(processors, monkeypatch):
    """The short request has fewer pages than shares."""
    monkeypatch.setattr(attention, "KEYS", 16)
    monkeypatch.setattr(attention, "processors", lambda device: processors)
    batch = PagedBatch((20, 400), (1, 4), 4, 2)
    compare_attention(batch, choose(batch, 20), True)


@pytest.mark.parametrize("processors", [1, 1000])
def test_a_wide_list_that_names_few_pages_and_a_request_without_keys(processors, monkeypatch):
    """Lists are as wide as the longest context. One request reads all its pages; a padding request has no keys."""
    monkeypatch.setattr(attention, "ENTRIES", 16)
    monkeypatch.setattr(attention, "KEYS", 16)
    monkeypatch.setattr(attention, "processors", lambda device: processors)
    batch = PagedBatch((400, 290, 20), (1, 1, 1), 4, 2)
    chosen = torch.full((3, 2, 70), -1, dtype=torch.int32)
    chosen[0, :, :4] = choose(batch, 4)[0]
    chosen[1, :, :19] = torch.arange(19)
    batch.kv_lens[2] = 0
    assert (compare_attention(batch, chosen, True)[2] == 0).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_attention_in_half_precision(dtype, tolerance):
    batch = PagedBatch([500, 333], [1, 1], heads=8, kv_heads=2, dim=128, page_size=64, per_block=1, dtype=dtype)
    compare_attention(batch, choose(batch, 5), True, tolerance)


def test_attention_over_a_cache_with_other_strides_and_shared_pages():
    batch = PagedBatch([128, 128], [1, 1])
    batch.page_table[1], batch.q[1] = batch.page_table[0], batch.q[0]
    batch.pages = batch.pages.transpose(1, 2).contiguous().transpose(1, 2)
    batch.q = torch.cat([batch.q, batch.q], 2)[..., : batch.q.shape[2]]
    chosen = choose(batch, 4)
    chosen[1] = chosen[0]
    got = compare_attention(batch, chosen, True)
    assert torch.equal(got[0], got[1])
