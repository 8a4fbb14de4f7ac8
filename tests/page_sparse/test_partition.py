"""The partition of a step's rows, and the kernel inputs for rows that choose."""

from types import SimpleNamespace

import pytest
import torch

from vllm_dlm.page_sparse.page_counts import PageCounts
from vllm_dlm.page_sparse.partition import partition, prompt_lengths
from vllm_dlm.page_sparse.queries import make_queries, page_table
from vllm_dlm.plugins.selection.unique import Unique

FOUR = Unique(page_size=16, budget_tokens=64, min_context=0)


def plan(counts, kv_lens, prompts, selection=FOUR):
    starts = [0, *torch.tensor(counts).cumsum(0).tolist()]
    made = partition(selection, starts, kv_lens, prompts)
    return made.prompt, made.whole, made.sparse


def test_a_prompt_is_one_piece():
    assert plan([50], [100], [100]) == ([(0, 0, 50, 100)], [], [])
    assert plan([50], [100], [200]) == ([(0, 0, 50, 100)], [], [])


def test_a_generated_position_chooses_where_something_is_left_out():
    assert plan([1], [101], [100]) == ([], [], [(0, 0, 101)])
    assert plan([1, 1], [64, 65], [60, 60]) == ([], [(0, 0, 64)], [(1, 1, 65)])
    longer = Unique(page_size=16, budget_tokens=64, min_context=102)
    assert plan([1, 1], [101, 102], [90, 90], longer) == ([], [(0, 0, 101)], [(1, 1, 102)])


def test_a_resumed_request_is_its_prompt_and_then_its_positions():
    assert plan([103], [103], [100]) == ([(0, 0, 100, 100)], [], [(0, 100, 101), (0, 101, 102), (0, 102, 103)])


def test_several_requests_and_one_without_rows():
    prompt, whole, sparse = plan([2, 0, 30, 1], [130, 7, 30, 20], [90, 7, 30, 10])
    assert prompt == [(2, 2, 30, 30)]
    assert whole == [(3, 32, 20)]
    assert sparse == [(0, 0, 129), (0, 1, 130)]


@pytest.mark.parametrize("prefilling, want", [([True, False, True], [100, 39, 1]), (None, [100, 39, 0])])
def test_prompt_lengths_nobody_told(prefilling, want):
    common = SimpleNamespace(
        num_reqs=3,
        query_start_loc_cpu=torch.tensor([0, 20, 21, 22]),
        seq_lens=torch.tensor([100, 40, 1]),
        seq_lens_cpu_upper_bound=None,
        is_prefilling=None if prefilling is None else torch.tensor(prefilling),
    )
    assert prompt_lengths(common, None) == want
    assert prompt_lengths(common, [5, 6, 7]) == [5, 6, 7]


def test_page_table():
    blocks = torch.tensor([[3, 1, 9], [0, 2, 9]], dtype=torch.int32)
    assert page_table(blocks, 2, 2).tolist() == [[6, 7, 2, 3], [0, 1, 4, 5]]


@pytest.mark.parametrize("rows", [[4, 5, 6], [1, 2, 9]])
def test_rows(rows):
    made = make_queries(
        FOUR, rows, torch.tensor([65, 96, 100], dtype=torch.int32), [65, 96, 100], torch.tensor([[0, 1, 2, 3]] * 3), 2
    )
    assert torch.arange(20)[made.rows].tolist() == rows
    assert made.num_pages.tolist() == [4, 5, 6]
    assert made.page_table.shape == (3, 7) and made.tail == 1


def test_counts():
    """Counts only generated positions: one reads four of five pages, and one reads both of its pages."""
    made = partition(FOUR, [0, 1, 2, 32], [70, 20, 30], [60, 10, 30])
    assert made.counts(FOUR) == PageCounts(sparse_rows=1, dense_rows=1, pages_read=6, pages_seen=7)
    total = PageCounts()
    total.add(made.counts(FOUR), 3)
    assert total == PageCounts(3, 3, 18, 21)
