"""The pyramid against PyWavelets and against plain means and standard deviations."""

import pytest
import pywt
import torch

from tests.kernels.pages import PagedBatch
from vllm_dlm.kernels.haar_pyramid import INVALID, STD_KINDS, naive, store_statistics
from vllm_dlm.kernels.haar_pyramid.torch import haar_pyramid


@pytest.fixture
def batch():
    return PagedBatch([200, 64, 7], [1, 1, 1], dtype=torch.float64, page_size=16, per_block=2)


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_bands_are_those_of_pywavelets(level):
    keys = torch.randn(3, 64, 8, dtype=torch.float64)
    low, details = naive.haar_bands(keys, level)
    want_low, *want_details = pywt.wavedec(keys.numpy(), "haar", level=level, axis=-2, mode="periodization")
    torch.testing.assert_close(low, torch.from_numpy(want_low), atol=1e-12, rtol=0)
    for got, want in zip(reversed(details), want_details, strict=True):
        torch.testing.assert_close(got, torch.from_numpy(want), atol=1e-12, rtol=0)


def keys_of(batch, page_ids):
    per_block = batch.pages.shape[2] // batch.page_size
    dim = batch.pages.shape[3] // 2
    by_page = batch.pages.unflatten(2, (per_block, -1)).transpose(1, 2).flatten(0, 1)
    return by_page[page_ids][..., :dim].double()  # [n, Hkv, P, D]


def test_naive_is_mean_and_variance(batch):
    levels = (0, 1, 2, 4)
    runs = keys_of(batch, batch.full_pages)
    for level, (mean, variance) in zip(
        levels, naive.haar_pyramid(batch.pages, batch.full_pages, 16, levels), strict=True
    ):
        pieces = runs.unflatten(2, (-1, 2**level))
        torch.testing.assert_close(mean, pieces.mean(3), atol=1e-12, rtol=0)
        torch.testing.assert_close(variance, pieces.var(3, correction=0), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("page_size, per_block, dim", [(16, 1, 64), (32, 2, 80), (64, 2, 96), (128, 1, 256)])
def test_fast_path_is_naive(dtype, page_size, per_block, dim):
    batch = PagedBatch([300, 128], [1, 1], page_size=page_size, per_block=per_block, dim=dim, dtype=dtype)
    levels = (1, 2, page_size.bit_length() - 1)
    fast = haar_pyramid(batch.pages, batch.full_pages, page_size, levels)
    for got, want in zip(fast, naive.haar_pyramid(batch.pages, batch.full_pages, page_size, levels), strict=True):
        for part, whole in zip(got, want, strict=True):
            torch.testing.assert_close(part.double(), whole, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("std_kind", STD_KINDS)
def test_statistics_of_each_kind(batch, std_kind):
    statistics = batch.statistics(std_kind)
    runs = keys_of(batch, batch.full_pages)
    variance = runs.var(2, correction=0)  # [n, Hkv, D]
    want = {
        "l2": lambda: (runs - runs.mean(2, keepdim=True)).square().sum(3).mean(2).sqrt()[..., None],
        "rms": lambda: variance.mean(-1, keepdim=True).sqrt(),
        "vector": variance.sqrt,
        "diag2": lambda: variance.unflatten(-1, (4, -1)).mean(-1),
    }[std_kind]()
    torch.testing.assert_close(statistics.mean[batch.full_pages, :, 0].double(), runs.mean(2), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(statistics.spread[batch.full_pages, :, 0].double(), want, atol=1e-6, rtol=1e-6)


def test_pages_nobody_wrote_stay_invalid_and_rewriting_is_idempotent(batch):
    statistics = batch.statistics("l2")
    others = torch.ones(len(statistics.mean), dtype=torch.bool)
    others[batch.full_pages] = False
    assert (statistics.spread[others] == INVALID).all()
    before = statistics.spread.clone(), statistics.mean.clone()
    for page in batch.full_pages.flip(0):  # one by one and in another order
        store_statistics(batch.pages, page[None], statistics)
    assert torch.equal(before[0], statistics.spread) and torch.equal(before[1], statistics.mean)
