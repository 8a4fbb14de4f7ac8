"""Page scores against the definition in float64, with ties, forced pages and NaN."""

import pytest
import torch

from tests.kernels.pages import PagedBatch, scored
from vllm_dlm.kernels.haar_pyramid import STD_KINDS
from vllm_dlm.kernels.page_scores import FORCED, LOWEST, REDUCTIONS, naive, page_scores
from vllm_dlm.kernels.top_pages import naive as naive_top
from vllm_dlm.kernels.top_pages import top_pages


def arguments(batch, statistics, reduce, recent=1):
    return (
        batch.q,
        batch.q_starts,
        statistics,
        batch.page_table,
        batch.num_pages,
        batch.num_pages - recent,
        1,
        0.5,
        reduce,
    )


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("std_kind", STD_KINDS)
@pytest.mark.parametrize("q_lens", [(1, 1, 1), (3, 1, 8)])
def test_fast_path_is_naive(std_kind, reduce, q_lens):
    batch = PagedBatch([200, 331, 17], q_lens, heads=6, kv_heads=2, dim=64)
    statistics = batch.statistics(std_kind)
    got = scored(page_scores, *arguments(batch, statistics, reduce))
    want = scored(naive.page_scores, *arguments(batch, statistics, reduce))
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision(dtype, tolerance, reduce):
    batch = PagedBatch([500, 333], [1, 1], heads=8, kv_heads=2, dim=128, dtype=dtype)
    statistics = batch.statistics("l2")
    got = scored(page_scores, *arguments(batch, statistics, reduce))
    want = scored(naive.page_scores, *arguments(batch, statistics, reduce))
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_invalid_pages_are_forced_and_nan_is_lowest(reduce):
    batch = PagedBatch([320], [2])
    statistics = batch.statistics("l2")
    invalid, broken = batch.page_table[0, 5], batch.page_table[0, 7]
    statistics.spread[invalid] = torch.inf
    statistics.mean[broken] = torch.nan
    for score in (page_scores, naive.page_scores):
        scores = scored(score, *arguments(batch, statistics, reduce))[0]
        assert (scores[:, [0, 5, 19]] == FORCED).all()
        assert (scores[:, 7] == LOWEST).all()
        others = [i for i in range(20) if i not in (0, 5, 7, 19)]
        assert scores[:, others].isfinite().all() and (scores[:, others].abs() < 1e6).all()


@pytest.mark.parametrize("k", [1, 5, 12, 40])
def test_top_pages_is_naive(k):
    scores = torch.randn(3, 2, 30, generator=torch.Generator().manual_seed(k))
    scores[0, 0, 3:9] = scores[0, 0, 3]  # ties
    scores[1] = scores[1].round()
    scores[1, :, 20:] = -torch.inf
    scores[2, :, 4:] = -torch.inf
    scores[2, 1, :2] = FORCED
    assert torch.equal(top_pages(scores, k), naive_top.top_pages(scores, k))


def test_ties_go_to_the_lowest_page():
    assert top_pages(torch.zeros(1, 1, 6), 3).tolist() == [[[0, 1, 2]]]
    assert top_pages(torch.tensor([[[1.0, 2, 1, 2, 1]]]), 3).tolist() == [[[0, 1, 3]]]
