"""The pages that a generated position reads, which are the same for all backends."""

import pytest
import torch

from vllm_dlm.page_sparse.queries import make_queries, pages_to_read
from vllm_dlm.page_sparse.summaries import empty_summaries
from vllm_dlm.plugins.selection.unique import Unique

PAGE, PAGES = 16, 6


class Unchecked(Unique):
    """UNIQUE without field checks, for budgets that leave nothing to choose."""

    def __post_init__(self): ...


@pytest.mark.parametrize(
    ("sink", "recent", "budget", "read"),
    [
        (1, 1, 2, [0, 5]),  # as many forced pages as the budget
        (2, 2, 3, [0, 1, 5]),  # one more than the budget: the first ones, and the last, with the query's own key
        (1, 4, 2, [0, 5]),
        (3, 1, 1, [5]),
    ],
)
@pytest.mark.parametrize("keys", [PAGES * PAGE, PAGES * PAGE - 5])
def test_the_last_page_is_read_however_many_are_forced(sink, recent, budget, read, keys):
    selection = Unchecked(budget_tokens=budget * PAGE, page_size=PAGE, sink_pages=sink, recent_pages=recent)
    cache = torch.zeros(PAGES, 1, PAGE, 16)
    summaries = empty_summaries(cache, selection)
    g = torch.Generator().manual_seed(0)
    selection.put(torch.randn(PAGES, 1, PAGE, 8, generator=g), torch.arange(PAGES), summaries)
    lens = torch.tensor([keys], dtype=torch.int32)
    rows = make_queries(selection, [0], lens, [keys], torch.arange(PAGES)[None], 1)
    q = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(1))
    assert pages_to_read(q, rows, summaries, selection, cache)[0, 0].tolist() == read
