"""The Triton kernels under the interpreter against their definitions; run by test_triton_interpreter.py, in a
process that never imported Triton without it. Memory that a launcher allocates holds garbage."""

import pytest
import torch

from tests.kernels.pages import PagedBatch
from vllm_dlm.kernels.haar_pyramid import INVALID, STD_KINDS, PageStatistics
from vllm_dlm.kernels.haar_pyramid import naive as naive_pyramid
from vllm_dlm.kernels.haar_pyramid import store_statistics as cpu_store
from vllm_dlm.kernels.haar_pyramid import triton as pyramid
from vllm_dlm.kernels.triton_utils import UPCAST

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def garbage(monkeypatch):
    def poisoned(make):
        def empty(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(torch.nan if made.is_floating_point() else -77)

        return empty

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


def test_the_interpreter_runs():
    assert UPCAST.value


@pytest.mark.parametrize(
    "page_size, per_block, dim, dtype",
    [(16, 1, 64, torch.float16), (32, 2, 80, torch.float32), (128, 1, 96, torch.bfloat16), (2, 8, 256, torch.float32)],
)
def test_pyramid(page_size, per_block, dim, dtype):
    batch = PagedBatch([150, 128], [1, 1], page_size=page_size, per_block=per_block, dim=dim, dtype=dtype)
    page_ids = batch.full_pages[:6]
    top = page_size.bit_length() - 1
    levels = (top, 0, 1)
    got = pyramid.haar_pyramid(batch.pages, page_ids, page_size, levels)
    for pair, wanted in zip(got, naive_pyramid.haar_pyramid(batch.pages, page_ids, page_size, levels), strict=True):
        for part, whole in zip(pair, wanted, strict=True):
            torch.testing.assert_close(part.double(), whole, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("std_kind", STD_KINDS)
@pytest.mark.parametrize("nodes, dim, dtype", [(1, 80, torch.bfloat16), (4, 66, torch.float32)])
def test_statistics(std_kind, nodes, dim, dtype):
    """Pages named by ids below 0 and pages not named stay as they are."""
    batch = PagedBatch([100, 64], [1, 1], dim=dim, dtype=dtype)
    got = PageStatistics.empty(batch.pages, 16, std_kind, nodes)
    want = PageStatistics.empty(batch.pages, 16, std_kind, nodes)
    page_ids = batch.full_pages[1:].clone()
    cpu_store(batch.pages, page_ids, want)
    pyramid.store_statistics(batch.pages, torch.cat([page_ids, torch.tensor([-1, -5])]).to(torch.int32), got)
    torch.testing.assert_close(got.mean, want.mean)
    torch.testing.assert_close(got.spread, want.spread, atol=1e-6, rtol=1e-5)
    assert (got.spread[batch.full_pages[0]] == INVALID).all()


def test_statistics_of_a_cache_with_other_strides():
    """Keys of all heads beside each other, as some engines keep them."""
    batch = PagedBatch([64], [1], dtype=torch.float16)
    got, want = PageStatistics.empty(batch.pages, 16, "l2"), batch.statistics("l2")
    pyramid.store_statistics(batch.pages.transpose(1, 2).contiguous().transpose(1, 2), batch.full_pages, got)
    torch.testing.assert_close(got.mean, want.mean)
    torch.testing.assert_close(got.spread, want.spread)
