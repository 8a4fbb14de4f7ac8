"""Selections over cached prompts: exact where everything is kept, batch-invariant, and equal to masks in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from tests.engine.batches import CHECKPOINTS
from tests.engine.running import Counted, runner_of, tokens
from tests.engine.selecting import assert_batch_invariant, assert_keeping_all_is_dense, engine, requests
from tests.kernels.pages import scored
from tests.tiers import slow
from vllm_dlm.cache.blocks import KVBlocks, Slots
from vllm_dlm.canvas.selected_keys import ChoicePool, SelectedKeys
from vllm_dlm.kernels.haar_pyramid import PageStatistics
from vllm_dlm.kernels.page_scores import REDUCTIONS, naive
from vllm_dlm.methods import methods
from vllm_dlm.options import request_options
from vllm_dlm.plugins.reuse.flow import Rows
from vllm_dlm.plugins.selection.base import Selection
from vllm_dlm.plugins.selection.unique import Unique
from vllm_dlm.step.counts import Counts
from vllm_dlm.step.selection import GroupSelection, ResponseQueries
from vllm_dlm.step.selection_packing import group_selection

SMALL = {"name": "unique", "page_size": 16, "budget_tokens": 64, "min_context": 0, "dense_layers": []}
WAVES = {"name": "wavefilter", "min_prompt": 64}
PINNED = {"keep_sink": 8, "keep_tail": 12}
SELECTIONS = {
    "unique": SMALL,
    "unique, a layer dense": SMALL | {"dense_layers": [0]},
    "unique, held": SMALL | {"select_every": 3},
    "paper": WAVES | {"preset": "paper"},
    "serve": WAVES | {"preset": "serve"} | PINNED,
    "serve-page": WAVES | {"preset": "serve-page", "proportions": [0.3]} | PINNED,
    "four levels, shared": WAVES | {"levels": 4, "proportions": 0.6, "head_mode": "shared", "normalization": "mean"},
    "db2, drift": WAVES | {"wavelet": "db2", "reselect": "drift:0.9"},
    "every": WAVES | {"budget": 40, "reselect": "every:3", "agg": "max"},
}
#: all of it kept, by the sparse path
KEEP_ALL = {
    "unique": SMALL | {"budget_tokens": 4096},
    "wavefilter": WAVES | {"proportions": 1.0},
    "wavefilter, tokens": WAVES | {"preset": "serve", "proportions": 1.0},
    "wavefilter, pages": WAVES | {"preset": "serve-page", "proportions": 1.0},
}


def each_on_one(checkpoints, names):
    """test_matrix.py has the methods as such on two checkpoints each."""
    return [(checkpoints[i % len(checkpoints)], name) for i, name in enumerate(names)]


def tiered(cases):
    """Selections that keep choices for several steps are tried in `make test`, all of them in `make test-slow`."""
    first = [case for case in cases if case[1] in ("unique, held", "db2, drift")]
    return [*first, *slow(*(case for case in cases if case not in first))]


@pytest.mark.parametrize(("checkpoint", "selection"), tiered(each_on_one(CHECKPOINTS, SELECTIONS)))
def test_mixed_batch_invariance_and_real_sparsity(engines, checkpoint, selection):
    assert_batch_invariant(engine(engines, checkpoint, SELECTIONS[selection]))


UNIQUE, *OTHERS = each_on_one(CHECKPOINTS, [*KEEP_ALL, "unique", "wavefilter, tokens"])


@pytest.mark.parametrize(("checkpoint", "selection"), [UNIQUE, *slow(*OTHERS[:-1]), OTHERS[-1]])
def test_keeping_everything_is_the_host_policy(engines, checkpoint, selection, monkeypatch):
    method = methods("selection")[KEEP_ALL[selection]["name"]]
    assert_keeping_all_is_dense(engines, checkpoint, KEEP_ALL[selection], method, monkeypatch)


def test_short_canvases_are_dense(engines):
    llm = engine(engines, "llada-tiny", SMALL | {"min_context": 200})
    given = list(requests(8))
    with Counted(llm) as counted:
        assert tokens(llm, given) == tokens(engines("llada-tiny"), given)
    assert counted.total("keys_scored") == 0


def test_freed_blocks_do_not_leak(engines):
    """With few blocks every request gets those of others, full of NaN."""
    llm = engine(engines, "llada-tiny", SMALL)
    tight = engine(engines, "llada-tiny", SMALL, num_gpu_blocks_override=15)
    for cache in runner_of(tight).kv_caches:
        cache.fill_(torch.nan)
    given = list(requests(16))
    assert tokens(tight, given) == tokens(llm, given)


# -- one view against masks over the whole canvas ---------------------------------------------


def view_of(selection: Selection, prompt_len=200, length=231, kv_heads=2, dim=32, block_size=32, frozen=False):
    generator = torch.Generator().manual_seed(0)
    blocks = -(-length // block_size)
    order = torch.randperm(2 * blocks + 4, generator=generator)
    pages = KVBlocks([torch.full((len(order), kv_heads, block_size, 2 * dim), torch.nan)])
    kv = torch.randn(length, kv_heads, 2 * dim, generator=generator)
    tables = order[:blocks].numpy(), order[blocks : 2 * blocks].numpy()
    view = SelectedKeys(selection, prompt_len, length, block_size, *tables, frozen, ChoicePool())
    position = torch.arange(length)
    slots = Slots(order[position // block_size], position % block_size)
    pages.write_plain(0, slots, *kv.split(dim, -1))
    refresh(view, pages, kv)
    q = torch.randn(3, 2 * kv_heads, dim, generator=generator)
    return view, pages, kv, q


def refresh(view: SelectedKeys, pages, kv) -> None:
    whole = group_selection([view], [view.length], [view.prompt_len], True, torch.from_numpy)
    whole.refresh(0, pages, kv[..., : kv.shape[2] // 2], Counts())


def step(view: SelectedKeys, queries: int) -> GroupSelection:
    """The view as a group of its own, of which so many rows of the response live."""
    view.step_begins()
    return group_selection([view], [queries], [0], False, torch.from_numpy)


def arguments(pages, q, counts) -> ResponseQueries:
    """What a group is asked with where all rows vote."""
    return ResponseQueries(0, pages, q, Rows(None, [len(q)]), torch.ones(len(q), dtype=torch.bool), 0.2, counts)


def seen_keys(units: torch.Tensor, length: int, unit: int) -> torch.Tensor:
    """Units that are read [Hkv, K] -> [Hkv, N] bool"""
    return torch.stack([torch.isin(torch.arange(length) // unit, own) for own in units])


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("std_kind", ["l2", "rms", "vector", "diag2"])
def test_view_is_a_mask(std_kind, reduce):
    selection = Unique(page_size=16, budget_tokens=96, min_context=0, dense_layers=(), std_kind=std_kind, reduce=reduce)
    view, pages, kv, q = view_of(selection)
    counts = Counts()
    group = step(view, 3)
    got = group.attend(arguments(pages, q, counts))
    (units,) = group.units(group.visible(arguments(pages, q, counts)))

    runs = kv[:192, :, :32].double().unflatten(0, (12, 16))  # whole pages of the prompt
    mean, variance = runs.mean(1), runs.var(1, correction=0)
    spread = {
        "l2": lambda: variance.sum(-1, keepdim=True).sqrt(),
        "rms": lambda: variance.mean(-1, keepdim=True).sqrt(),
        "vector": variance.sqrt,
        "diag2": lambda: variance.unflatten(-1, (4, -1)).mean(-1),
    }[std_kind]()
    scores = scored(
        naive.page_scores,
        q,
        torch.tensor([0, 3]),
        PageStatistics(mean[:, :, None], spread[:, :, None], 16, std_kind),
        torch.arange(12)[None],
        torch.tensor([12]),
        torch.tensor([13 - selection.recent_pages]),
        1,
        0.5,
        reduce,
    )
    want_pages = scores[0].sort(descending=True, stable=True)[1][:, :6].sort()[0]
    assert torch.equal(units[:, :6].long(), want_pages)

    mask = seen_keys(units, 231, 16).repeat_interleave(2, 0)[:, None]  # [H, 1, N]
    keys, values = (part.double().repeat_interleave(2, 1) for part in kv.split(32, -1))
    weight = (torch.einsum("lhd,nhd->hln", q.double(), keys) * 0.2).masked_fill(~mask, -torch.inf).softmax(-1)
    want = torch.einsum("hln,nhd->lhd", weight, values)
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=2e-6)
    assert counts.keys_read < counts.keys_dense == 231


def test_moved_values_add_what_a_mask_lets_through():
    view, pages, kv, q = view_of(Unique(page_size=16, budget_tokens=64, min_context=0, dense_layers=()), frozen=True)
    changed = torch.tensor([5, 60, 130, 210, 230])
    moved = torch.randn(5, 2, 32, generator=torch.Generator().manual_seed(4))
    group, places = step(view, 3), torch.full((1, 231), -1, dtype=torch.int32)
    places[0, changed] = torch.arange(5, dtype=torch.int32)
    got = group.delta(arguments(pages, q, Counts()), moved, places)
    mask = seen_keys(group.units(group.visible(arguments(pages, q, Counts())))[0], 231, 16).repeat_interleave(2, 0)[
        :, None
    ]
    assert not mask[:, 0, changed].all() and mask[:, 0, changed].any()
    keys = kv[..., :32].double().repeat_interleave(2, 1)
    weight = (torch.einsum("lhd,nhd->hln", q.double(), keys) * 0.2).masked_fill(~mask, -torch.inf).softmax(-1)
    want = torch.einsum("hls,shd->lhd", weight[..., changed], moved.double().repeat_interleave(2, 1))
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=2e-6)


def test_choices_last_as_long_as_they_should():
    view, pages, kv, q = view_of(Unique(page_size=16, budget_tokens=64, min_context=0, dense_layers=(), select_every=2))
    chose, shown = [], []
    for number in range(6):
        group, counts = step(view, 3), Counts()
        shown.append(group.units(group.visible(arguments(pages, q * (-1) ** number, counts))))
        chose.append(view.chooses)
        assert chose[-1] == (counts.keys_scored > 0)
    assert chose == [True, False] * 3
    assert torch.equal(shown[0], shown[1]) and torch.equal(shown[0], shown[4])
    group = step(view, 3)
    assert not torch.equal(shown[0], group.units(group.visible(arguments(pages, -q, Counts()))))
    assert not view.step_begins()
    refresh(view, pages, kv)
    assert view.step_begins() and not view.known
    frozen = view_of(Unique(page_size=16, budget_tokens=64, min_context=0, dense_layers=()), frozen=True)[0]
    assert frozen.step_begins()
    assert not any(frozen.step_begins() for _ in range(5))


class Returning(Unique):
    """As a selection would that knows nothing of where choices are held."""

    def choose(self, asked):
        return super().choose(replace(asked, prompts=replace(asked.prompts, held=None)))


def test_choices_that_are_returned_last_as_long():
    fields = {"page_size": 16, "budget_tokens": 64, "min_context": 0, "dense_layers": (), "select_every": 3}
    shown = []
    for cls in (Unique, Returning):
        view, pages, _, q = view_of(cls(**fields))
        for number in range(4):
            group = step(view, 3)
            shown.append(group.units(group.visible(arguments(pages, q * (-1) ** number, Counts()))))
    assert all(torch.equal(one, other) for one, other in zip(shown[:4], shown[4:], strict=True))
    assert torch.equal(shown[0], shown[2]) and not torch.equal(shown[0], shown[3])


def test_memory_of_summaries_is_asked_for(engines):
    llm = engine(engines, "llada-tiny", SMALL)
    shape = runner_of(llm).denoiser.shape
    options = request_options(llm.model_config.dlm_options, {})
    kv, features, summaries, _ = shape.blocks(options, 2000, 2100)
    assert (features, summaries) == (0, -(-(2000 // 16) // shape.block_size))
    assert shape.tokens(options, 2000, 2100) == (kv + summaries) * shape.block_size
    assert np.array_equal(shape.blocks(options, 40, 60), (-(-60 // shape.block_size), 0, 0, 0))


def test_units_must_fit_into_blocks(engines):
    with pytest.raises(ValueError, match="block_size: 32 is not a multiple of the 64 tokens"):
        engine(engines, "llada-tiny", {"name": "unique"}, block_size=32)
    llm = engines("llada-tiny", block_size=32)
    with pytest.raises(ValueError, match="dlm_selection"):
        tokens(llm, [({"prompt_token_ids": [1, 2, 3]}, SamplingParams(extra_args={"dlm_selection": "unique"}))])
    # units of one token fit into any block, and a short prompt is read whole
    plain, chosen = (
        SamplingParams(temperature=0, max_tokens=8, extra_args=extra)
        for extra in ({}, {"dlm_selection": "wavefilter/serve"})
    )
    asked = {"prompt_token_ids": [1, 2, 3]}
    assert tokens(llm, [(asked, chosen)]) == tokens(llm, [(asked, plain)])
