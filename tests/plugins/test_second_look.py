"""A second look at candidates: their exact attention decides, for canvases and for generated positions."""

from dataclasses import replace

import pytest
import torch

from tests.plugins.asking import canvas_asks
from tests.plugins.test_pages import DIM, FIELDS, KV_HEADS, PAGE, generated_positions
from vllm_dlm.page_sparse.queries import chosen_pages
from vllm_dlm.plugins.selection.second_look import SecondLook
from vllm_dlm.plugins.selection.unique import Unique

SELECTION = SecondLook(**FIELDS)
ONE_LOOK = Unique(**FIELDS)


def best(q, keys, candidates, forced, kept):
    """q [L, Hkv, G, D], keys [N, P, Hkv, D] -> pages with the most attention among candidates [Hkv, C]"""
    logits = torch.einsum("lhgd,nphd->hlgnp", q.double(), keys.double()) / DIM**0.5
    left_out = torch.ones(KV_HEADS, len(keys), dtype=torch.bool).scatter_(1, candidates, False)
    left_out[:, forced] = True
    share = logits.masked_fill(left_out[:, None, None, :, None], -torch.inf).flatten(3).softmax(3)
    share = share.unflatten(3, (-1, PAGE)).sum((1, 2, 4))
    share[:, forced] = torch.inf
    return share.topk(kept)[1].sort()[0]


@pytest.mark.parametrize("candidates", [1, 2, 100])
def test_queries_of_a_canvas(candidates):
    g = torch.Generator().manual_seed(0)
    keys, q = torch.randn(20 * PAGE + 5, KV_HEADS, DIM, generator=g), torch.randn(6, 4, DIM, generator=g)
    selection = replace(SELECTION, candidates=candidates)
    got = selection.choose(canvas_asks(selection, q, keys)).units[0].long()
    wider = replace(ONE_LOOK, budget_tokens=min(20, 6 * candidates) * PAGE)
    found = wider.choose(canvas_asks(wider, q, keys)).units[0].long()
    pages = keys[: 20 * PAGE].unflatten(0, (20, PAGE))
    assert torch.equal(got, best(q.unflatten(1, (KV_HEADS, -1)), pages, found, [0, 19], 6))
    if candidates == 1:
        assert torch.equal(got, found)


@pytest.mark.parametrize("candidates", [1, 2, 100])
def test_generated_positions(candidates):
    selection = replace(SELECTION, candidates=candidates)
    q, rows, summaries, cache, _ = generated_positions(selection)
    got = chosen_pages(q, rows, summaries, selection, cache).long()
    wider = replace(ONE_LOOK, budget_tokens=(min(20, 5 * candidates) + 1) * PAGE)
    found = chosen_pages(q, rows, summaries, wider, cache).long()
    keys = cache[..., :DIM].unflatten(2, (2, PAGE)).transpose(1, 2).flatten(0, 1)  # [pages, Hkv, P, D]
    for i, count in enumerate(rows.num_pages.tolist()):
        own = keys[rows.page_table[i, :count].long()].transpose(1, 2)
        those = found[i, :, : int((found[i, 0] >= 0).sum())]
        want = best(q[i].unflatten(0, (KV_HEADS, -1))[None], own, those, [0, count - 1], 5)
        assert torch.equal(got[i], want)
