"""Attention over pages, and changes of contexts by changed values, against their definitions."""

import pytest
import torch

from vllm_dlm.kernels.delta_attention import delta_attention
from vllm_dlm.kernels.delta_attention.naive import delta_attention as naive_delta
from vllm_dlm.kernels.paged_attention import paged_attention
from vllm_dlm.kernels.paged_attention.naive import paged_attention as naive_paged

HEADS = [(4, 4), (8, 2)]


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize(("q_lens", "kv_lens"), [([1], [1]), ([5, 0, 20], [33, 64, 100]), ([70, 3], [70, 200])])
def test_pages(heads, kv_heads, q_lens, kv_lens):
    """Physical pages are permuted, last pages are partly filled, and unused memory is NaN."""
    torch.manual_seed(0)
    size, dim = 32, 16
    needed = [-(-n // size) for n in kv_lens]
    free = torch.randperm(sum(needed) + 3)
    tables = list(free[: sum(needed)].split(needed))
    pages = torch.full((len(free), kv_heads, size, 2 * dim), torch.nan)
    for table, length in zip(tables, kv_lens, strict=True):
        for position in range(length):
            pages[table[position // size], :, position % size] = torch.randn(kv_heads, 2 * dim)
    q = torch.randn(sum(q_lens), heads, dim)
    got = paged_attention(q, pages, tables, q_lens, kv_lens, dim**-0.5)
    torch.testing.assert_close(got, naive_paged(q, pages, tables, q_lens, kv_lens, dim**-0.5), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("of", [[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]])
def test_sequences_of_one_table(of):
    """Prefixes of one canvas, with NaN after the longest, and a prefix of another canvas between them."""
    torch.manual_seed(0)
    both = torch.randperm(8).split(4)
    pages = torch.full((8, 2, 32, 32), torch.nan)
    for table, length in zip(both, (100, 70), strict=True):
        for position in range(length):
            pages[table[position // 32], :, position % 32] = torch.randn(2, 32)
    tables, kv_lens = [both[which] for which in of], [(96, 60)[which] + number for number, which in enumerate(of)]
    q = torch.randn(12, 4, 16)
    got = paged_attention(q, pages, tables, [4, 4, 4], kv_lens, 0.25)
    torch.testing.assert_close(got, naive_paged(q, pages, tables, [4, 4, 4], kv_lens, 0.25), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("changed", [[], [0], [3, 17, 49]])
def test_delta(heads, kv_heads, changed):
    torch.manual_seed(0)
    query, key = torch.randn(7, heads, 16), torch.randn(kv_heads, 50, 16)
    delta = torch.randn(len(changed), kv_heads, 16)
    index = torch.tensor(changed, dtype=torch.int64)
    got = delta_attention(query, key, key[:, index], delta, 0.25)
    torch.testing.assert_close(got, naive_delta(query, key, key[:, index], delta, 0.25), atol=2e-6, rtol=1e-5)


def test_delta_is_the_change_of_the_context_when_only_values_move():
    torch.manual_seed(0)
    query, key, value = torch.randn(5, 2, 16), torch.randn(2, 30, 16), torch.randn(30, 2, 16)
    moved = value.clone()
    moved[[4, 9]] += 1.0

    def context(values):
        weight = torch.einsum("lhd,hnd->hln", query * 0.25, key).softmax(-1)
        return torch.einsum("hln,nhd->lhd", weight, values)

    index = torch.tensor([4, 9])
    got = delta_attention(query, key, key[:, index], (moved - value)[index], 0.25)
    torch.testing.assert_close(got, context(moved) - context(value), atol=2e-6, rtol=1e-5)
