"""Which pages a generated position reads: one rule for all backends."""

from types import SimpleNamespace

import pytest
import torch

from vllm_dlm.kernels.haar_pyramid import PageStatistics, store_statistics_of
from vllm_dlm.page_sparse.queries import choose, make_queries

PAGE, PAGES = 16, 6


@pytest.fixture
def statistics():
    keys = torch.randn(PAGES, 1, PAGE, 8, generator=torch.Generator().manual_seed(0))
    statistics = PageStatistics.empty(torch.zeros(PAGES, 1, PAGE, 16), PAGE, "l2")
    store_statistics_of(keys, torch.arange(PAGES), statistics)
    return statistics


@pytest.mark.parametrize(
    ("sink", "recent", "budget", "read"),
    [
        (1, 1, 2, [0, 5]),  # as many forced pages as may be read
        (2, 2, 3, [0, 1, 5]),  # one more: the first ones, and the last, which holds the query's own key
        (1, 4, 2, [0, 5]),
        (3, 1, 1, [5]),
    ],
)
@pytest.mark.parametrize("keys", [PAGES * PAGE, PAGES * PAGE - 5])
def test_the_last_page_is_read_however_many_are_forced(statistics, sink, recent, budget, read, keys):
    selection = SimpleNamespace(
        page_size=PAGE, sink_pages=sink, recent_pages=recent, budget_pages=budget, lam=0.5, reduce="max"
    )
    lens = torch.tensor([keys], dtype=torch.int32)
    rows = make_queries(selection, [0], lens, [keys], torch.arange(PAGES)[None], 1)
    q = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(1))
    assert choose(q, rows, statistics, selection)[0, 0].tolist() == read
