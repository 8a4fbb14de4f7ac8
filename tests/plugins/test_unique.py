"""UNIQUE over a cached prompt."""

from dataclasses import replace

import pytest
import torch

from tests.plugins.asking import canvas_asks
from vllm_dlm.kernels.page_scores import naive
from vllm_dlm.plugins.selection.unique import Unique

KV_HEADS, DIM, PAGES = 2, 16, 20
SELECTION = Unique(page_size=16, budget_tokens=96, min_context=0, dense_layers=())


@pytest.fixture
def asked():
    g = torch.Generator().manual_seed(0)
    keys = torch.randn(PAGES * 16, KV_HEADS, DIM, generator=g)
    q = torch.randn(6, 4, DIM, generator=g)
    voters = torch.tensor([True, False, False, True, False, False])
    return canvas_asks(SELECTION, q, keys, voters=voters), keys


def best(q, keys):
    """The pages chosen by the definition, query by query: [Hkv, 6]"""
    pages = keys.double().unflatten(0, (PAGES, 16))  # [N, P, Hkv, D]
    mean = pages.mean(1)
    spread = (pages - mean[:, None]).square().mean(1).sum(-1).sqrt()  # [N, Hkv]
    rows = q.double().unflatten(1, (KV_HEADS, -1))  # [L, Hkv, G, D]
    score = torch.einsum("lhgd,nhd->hnlg", rows, mean) + 0.5 * torch.einsum("lhg,nh->hnlg", rows.norm(dim=-1), spread)
    score = (score / DIM**0.5).amax((2, 3))
    score[:, [0, -2, -1]] = naive.FORCED
    return score.topk(6)[1].sort()[0]


def test_rows_that_are_still_masked_choose(asked):
    given, keys = asked
    masked = SELECTION.choose(given).units[0]
    assert torch.equal(masked.long(), best(given.q[given.prompts.voters], keys))
    every = replace(SELECTION, query_set="active").choose(given).units[0]
    assert torch.equal(every.long(), best(given.q, keys))
    assert not torch.equal(masked, every)


def test_where_none_is_masked_all_choose(asked):
    given, keys = asked
    given.prompts.voters = torch.zeros(6, dtype=torch.bool)
    assert torch.equal(SELECTION.choose(given).units[0].long(), best(given.q, keys))
