"""The hard mask of training equals the selection of serving: the same pages and the same attention on a paged cache."""

import pytest
import torch

from tests.kernels.pages import scored
from vllm_dlm.kernels.haar_pyramid import STD_KINDS, PageStatistics, store_statistics
from vllm_dlm.kernels.page_scores import REDUCTIONS, page_scores
from vllm_dlm.kernels.soft_page_attention import Gate, soft_page_attention
from vllm_dlm.kernels.sparse_attention import sparse_attention
from vllm_dlm.kernels.top_pages import top_pages

SIZE, BUDGET, SINK, RECENT, DIM = 16, 5, 1, 2, 32
SCALE = DIM**-0.5


def sequence(length, heads=4, kv_heads=2):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, h, length, DIM, generator=g) for h in (heads, kv_heads, kv_heads)]


def cached(k, v, std_kind):
    """k, v [1, Hkv, N, D] -> pages in shuffled order, statistics of whole pages, page table"""
    length = k.shape[2]
    count = -(-length // SIZE)
    table = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    pages = torch.full((count, k.shape[1], SIZE, 2 * DIM), torch.nan)
    for logical, physical in enumerate(table.tolist()):
        part = slice(logical * SIZE, min(length, (logical + 1) * SIZE))
        pages[physical, :, : part.stop - part.start] = torch.cat([k[0, :, part], v[0, :, part]], -1)
    statistics = PageStatistics.empty(pages, SIZE, std_kind)
    store_statistics(pages, table[: length // SIZE], statistics)
    return pages, statistics, table[None]


def chosen_by_serving(q, statistics, table, pages, forced_from, reduce):
    """q [L, H, D]"""
    starts = torch.tensor([0, len(q)])
    scores = scored(
        page_scores, q, starts, statistics, table, torch.tensor([pages]), torch.tensor([forced_from]), SINK, 0.5, reduce
    )
    return top_pages(scores, BUDGET)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("std_kind", STD_KINDS)
def test_decoding_one_token_after_the_other(std_kind, reduce):
    length = 190
    q, k, v = sequence(length)
    gate = Gate(SIZE, BUDGET, std_kind=std_kind, reduce=reduce, sink_pages=SINK, recent_pages=RECENT, temperature=0.0)
    trained = soft_page_attention(q, k, v, gate, SCALE)
    for position in (3, 79, 80, 97, 143, 144, 175, 189):
        seen = position + 1
        pages, statistics, table = cached(k[:, :, :seen], v[:, :, :seen], std_kind)
        query, count = q[0, :, position][None], table.shape[1]
        chosen = chosen_by_serving(query, statistics, table, count, count - RECENT, reduce)
        served = sparse_attention(
            query, torch.tensor([0, 1]), pages, table, chosen, torch.tensor([seen]), SIZE, SCALE, True
        )
        torch.testing.assert_close(trained[0, :, position][None], served, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("prompt_len", [160, 171])
def test_a_response_reads_the_prompt(prompt_len, reduce):
    length = prompt_len + 24
    q, k, v = sequence(length)
    gate = Gate(SIZE, BUDGET, reduce=reduce, sink_pages=SINK, recent_pages=RECENT, temperature=0.0, causal=False)
    trained = soft_page_attention(q, k, v, gate, SCALE, prompt_len)[0, :, prompt_len:].transpose(0, 1)  # [L, H, D]
    pages, statistics, table = cached(k, v, "l2")
    queries, whole = q[0, :, prompt_len:].transpose(0, 1), prompt_len // SIZE
    chosen = chosen_by_serving(queries, statistics, table, whole, -(-prompt_len // SIZE) - RECENT, reduce)
    # keys outside whole pages of the prompt are always read
    rest = torch.arange(whole, table.shape[1], dtype=torch.int32).expand(1, 2, -1)
    served = sparse_attention(
        queries,
        torch.tensor([0, len(queries)]),
        pages,
        table,
        torch.cat([chosen, rest], -1),
        torch.tensor([length]),
        SIZE,
        SCALE,
        False,
    )
    torch.testing.assert_close(trained, served, atol=2e-6, rtol=1e-5)
