"""Attention over chosen pages against the masked definition in float64, and dense attention as its limit."""

import pytest
import torch

from tests.kernels.pages import PagedBatch, scored
from vllm_dlm.kernels.page_scores import page_scores
from vllm_dlm.kernels.paged_attention import paged_attention
from vllm_dlm.kernels.sparse_attention import naive, sparse_attention
from vllm_dlm.kernels.top_pages import top_pages


def choose(batch, k):
    """Chooses the last pages, the first page, and the highest-scored other pages."""
    scores = scored(
        page_scores,
        batch.q,
        batch.q_starts,
        batch.statistics("l2"),
        batch.page_table,
        batch.num_pages,
        batch.kv_lens // batch.page_size - 1,
        1,
        0.5,
        "max",
    )
    return top_pages(scores, k)


def arguments(batch, chosen, causal):
    scale = batch.q.shape[2] ** -0.5
    return (
        batch.q,
        batch.q_starts,
        batch.pages,
        batch.page_table,
        chosen,
        batch.kv_lens,
        batch.page_size,
        scale,
        causal,
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "kv_lens, q_lens", [((200,), (1,)), ((208, 336), (1, 1)), ((200, 333, 48), (3, 1, 8)), ((90, 700), (5, 5))]
)
@pytest.mark.parametrize(
    "heads, kv_heads, dim, page_size, per_block", [(4, 4, 64, 16, 2), (6, 2, 80, 16, 1), (8, 1, 128, 32, 2)]
)
def test_fast_path_is_naive(kv_lens, q_lens, heads, kv_heads, dim, page_size, per_block, causal):
    batch = PagedBatch(kv_lens, q_lens, heads, kv_heads, dim, page_size, per_block)
    chosen = choose(batch, 6)
    got = sparse_attention(*arguments(batch, chosen, causal))
    torch.testing.assert_close(got, naive.sparse_attention(*arguments(batch, chosen, causal)), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision(dtype, tolerance):
    batch = PagedBatch([500, 333], [1, 1], heads=8, kv_heads=2, dim=128, dtype=dtype)
    chosen = choose(batch, 8)
    got = sparse_attention(*arguments(batch, chosen, True))
    want = naive.sparse_attention(*arguments(batch, chosen, True))
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kv_lens", [(200, 333, 48), (64, 64)])
def test_all_pages_are_dense_attention(kv_lens):
    """The same kernel gets the same keys in the same order, so results are bit-identical."""
    batch = PagedBatch(kv_lens, [2] * len(kv_lens), page_size=16, per_block=2)
    chosen = choose(batch, 64)
    blocks = [table[: -(-length // 16)][::2] // 2 for table, length in zip(batch.page_table, kv_lens, strict=True)]
    dense = paged_attention(batch.q, batch.pages, blocks, [2] * len(kv_lens), kv_lens, batch.q.shape[2] ** -0.5)
    torch.testing.assert_close(sparse_attention(*arguments(batch, chosen, False)), dense, atol=2e-6, rtol=2e-6)


def test_pages_shared_between_requests():
    batch = PagedBatch([128, 128], [1, 1])
    batch.page_table[1] = batch.page_table[0]
    batch.q[1] = batch.q[0]
    got = sparse_attention(*arguments(batch, choose(batch, 4), True))
    assert torch.equal(got[0], got[1])
