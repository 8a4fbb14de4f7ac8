"""The base class of page selections, for both engines, tested with a method that only uses means and has no kernel."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from tests.plugins.asking import canvas_asks
from vllm_dlm.kernels.page_scores import FORCED, LOWEST
from vllm_dlm.page_sparse.queries import chosen_pages, make_queries
from vllm_dlm.page_sparse.summaries import empty_summaries
from vllm_dlm.plugins.selection.base import ChoiceQuery
from vllm_dlm.plugins.selection.pages import PageSelection
from vllm_dlm.plugins.selection.unique import Unique

PAGE, KV_HEADS, DIM = 16, 2, 16
FIELDS = {"page_size": PAGE, "budget_tokens": 6 * PAGE, "min_context": 0, "dense_layers": ()}


@dataclass(frozen=True)
class Means(PageSelection):
    name: ClassVar[str] = "means"

    def vectors(self, dim, dtype):
        return (dim, dtype), (1, dtype)

    def describe(self, keys):
        mean = keys.mean(2)
        return mean, torch.zeros_like(mean[..., :1])

    def score(self, q, first, second):
        return q @ first.mT


MEANS, UNIQUE = Means(**FIELDS), Unique(lam=0.0, **FIELDS)


def generated_positions(selection, keys=(190, 333, 147)):
    """Generated positions of three requests with shuffled pages."""
    g = torch.Generator().manual_seed(0)
    order = torch.randperm(3 * 11, generator=g).view(3, 11)  # blocks of two pages
    cache = torch.randn(order.numel(), KV_HEADS, 2 * PAGE, 2 * DIM, generator=g)
    summaries = empty_summaries(cache, selection)
    pages = torch.cat(
        [(blocks[:, None] * 2 + torch.arange(2)).flatten()[: n // PAGE] for n, blocks in zip(keys, order, strict=True)]
    )
    selection.store(cache, torch.cat([pages, pages.new_tensor([-1])]), summaries)
    q = torch.randn(3, 4, DIM, generator=g)
    rows = make_queries(selection, [0, 1, 2], torch.tensor(keys, dtype=torch.int32), list(keys), order, 2)
    return q, rows, summaries, cache, pages


def test_the_rule_is_that_of_the_kernel():
    """UNIQUE without its spread orders pages in the same way, but scores them with its own kernel."""
    keys, q = torch.randn(20 * PAGE + 5, KV_HEADS, DIM), torch.randn(6, 4, DIM)
    voters = torch.tensor([True, False, False, True, False, False])
    ours, kernel = (s.choose(canvas_asks(s, q, keys, voters=voters)) for s in (MEANS, UNIQUE))
    assert torch.equal(ours.units, kernel.units) and ours.scored == kernel.scored == 20
    chosen = []
    for selection in (MEANS, UNIQUE):
        q, rows, summaries, cache, _ = generated_positions(selection)
        chosen.append(chosen_pages(q, rows, summaries, selection, cache))
    assert torch.equal(*chosen)


@pytest.mark.parametrize("selection", [MEANS, UNIQUE])
def test_first_last_and_undescribed_pages_are_read(selection):
    q, rows, summaries, _, _ = generated_positions(selection, (65, 96, 100))
    assert rows.num_pages.tolist() == [4, 5, 6]
    summaries.second[rows.page_table[2, 3]] = torch.inf
    summaries.first[rows.page_table[2, 1]] = torch.nan
    starts, ends = rows.q_starts[:-1], rows.q_starts[1:]
    asked = ChoiceQuery(q, starts, ends, 1, summaries, rows.page_table, rows.num_pages)
    scores = selection.scores(asked)
    for own, forced, count in zip(scores, ([0, 3], [0, 4], [0, 3, 5]), (4, 5, 6), strict=True):
        assert (own == FORCED).nonzero()[:, 1].tolist() == 2 * forced
        assert (own[:, count:] == -torch.inf).all() and (own[:, :count] > -torch.inf).all()
    assert (scores[2, :, 1] == LOWEST).all()


@pytest.mark.parametrize("selection", [MEANS, UNIQUE, Unique(std_kind="vector", **FIELDS)])
def test_pages_are_described_alike_from_a_cache_and_by_hand(selection):
    _, _, summaries, cache, pages = generated_positions(selection)
    by_hand = empty_summaries(cache, selection)
    keys = cache[..., :DIM].unflatten(2, (2, PAGE)).transpose(1, 2).flatten(0, 1)[pages]  # [n, Hkv, P, D]
    selection.put(keys, pages, by_hand)
    torch.testing.assert_close(summaries.first[pages], by_hand.first[pages])
    torch.testing.assert_close(summaries.second[pages], by_hand.second[pages])
    others = torch.ones(len(summaries.second), dtype=torch.bool)
    others[pages], others[0] = False, False
    assert summaries.second[others].isinf().all()


def test_what_is_left_out():
    selection = Unique(**FIELDS | {"min_context": 100})
    assert [selection.leaves_out(keys) for keys in (96, 97, 99, 100)] == [False, False, False, True]
    assert [selection.applies(111, length) for length in (112, 300)] == [False, False]
    assert [selection.applies(112, length) for length in (99, 112, 300)] == [False, True, True]
