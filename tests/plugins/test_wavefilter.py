"""The descent against the paper's Algorithm 1 as printed, and what the fields refuse."""

import math

import pytest
import pywt
import torch

from tests.plugins.asking import canvas_asks
from vllm_dlm.options import OptionError, server_options
from vllm_dlm.plugins.selection.base import StoredChoices
from vllm_dlm.plugins.selection.wavefilter import WaveFilter


def asked(n=203, heads=4, kv_heads=2, dim=16, queries=5, seed=0, selection=None):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(n, kv_heads, dim, generator=generator)
    # neighbouring keys are similar, or the coarse scales would be uninformative
    keys = keys + 2 * torch.randn(n // 8 + 1, kv_heads, dim, generator=generator).repeat_interleave(8, 0)[:n]
    q = torch.randn(queries, heads, dim, generator=generator)
    voters = torch.arange(queries) % 2 == 0
    return canvas_asks(selection, q, keys, length=n + 32, voters=voters), keys


def algorithm_1(q, keys, wavelet, levels, proportions):
    """Algorithm 1 for one key head, in float64: transform remaining keys, softmax, sum columns, keep, map back, repeat.
    q [n, D] all queries of the head's group; keys [N, D] -> kept positions"""
    kept = torch.arange(len(keys) // 2**levels * 2**levels)
    for scale, share in zip(range(levels, 0, -1), proportions, strict=True):
        band = pywt.wavedec(keys[kept].double().numpy(), wavelet, level=scale, axis=0, mode="periodization")[0]
        weight = (q.double() @ torch.from_numpy(band).T / q.shape[1] ** 0.5).softmax(-1).sum(0)
        best = weight.topk(math.ceil(share * len(weight) - 1e-9))[1].sort()[0]
        kept = kept[(best[:, None] * 2**scale + torch.arange(2**scale)).flatten()]
    return kept


@pytest.mark.parametrize("wavelet", ["haar", "db2", "sym4"])
@pytest.mark.parametrize(
    "proportions", [(0.3,), (0.4, 0.4), (0.5, 0.4, 0.3), (0.5, 0.5, 0.5, 0.5), (0.8, 0.2), (1.0, 0.25)]
)
def test_descent_is_algorithm_1(wavelet, proportions):
    selection = WaveFilter(wavelet=wavelet, levels=len(proportions), proportions=proportions, min_prompt=0)
    given, keys = asked(selection=selection)
    units = selection.choose(given).units[0]
    for head, own in enumerate(units):
        queries = given.q[:, 2 * head : 2 * head + 2].flatten(0, 1)
        got = (own[:, None] * 2 + torch.arange(2)).flatten()
        assert torch.equal(got.long(), algorithm_1(queries, keys[:, head], wavelet, len(proportions), proportions))


def test_sizes_follow_the_proportions():
    selection = WaveFilter(levels=2, proportions=(0.6, 0.6, 0.444), token_stage=True, min_prompt=0)
    assert selection.kept(256) == [154, 185, 165] and selection.unit == 1
    assert abs(165 / 1024 - 0.16) < 0.002
    assert WaveFilter(budget=0.16).kept(256)[-1] * 2 / 1024 == pytest.approx(0.16, abs=0.005)
    assert WaveFilter(budget=128).kept(256)[-1] * 2 == pytest.approx(128, abs=8)
    assert server_options({"selection": {"name": "wavefilter"}}, "random").selection == WaveFilter()
    page = server_options({"selection": {"name": "wavefilter", "preset": "serve-page"}}, "random").selection
    assert (
        page.unit == 16 and page == server_options({"selection": {"name": "wavefilter/serve-page"}}, "random").selection
    )


@pytest.mark.parametrize(
    "extra",
    [{"proportions": (0.6, 0.4)}, {"detail_lambda": 0.5}, {"token_stage": True, "proportions": (0.5, 0.5, 0.5)}],
)
def test_pinned_tokens_stay(extra):
    selection = WaveFilter(**{"proportions": (0.3, 0.3), "keep_sink": 4, "keep_tail": 5, "min_prompt": 0, **extra})
    given, _ = asked(1803, selection=selection)
    units = selection.choose(given).units[0]
    free = selection.prompt_units(1803).candidates
    for own in units:
        assert torch.equal(own, own.unique())  # ascending, no repeats
        positions = set((own[:, None] * selection.unit + torch.arange(selection.unit)).flatten().tolist())
        assert set(range(4)) <= positions and set(range(1798, free)) <= positions


def test_detail_bound_finds_the_needle_a_mean_hides():
    """One key points along the query and its neighbours point against it, so their mean is about zero."""
    selection = {lam: WaveFilter(proportions=(0.1, 0.5), detail_lambda=lam, min_prompt=0) for lam in (0.0, 0.5)}
    q = torch.zeros(1, 1, 8)
    q[..., 0] = 8.0
    keys = 0.01 * torch.randn(256, 1, 8, generator=torch.Generator().manual_seed(0))
    keys[100:104, 0, 0] = torch.tensor([3.0, -1.0, -1.0, -1.0]) * 4
    found = {}
    for lam, chosen in selection.items():
        given = canvas_asks(chosen, q, keys, length=300)
        found[lam] = 50 in chosen.choose(given).units[0, 0].tolist()
    assert found == {0.0: False, 0.5: True}


def test_drift_keeps_a_choice_that_still_overlaps():
    selection = WaveFilter(reselect="drift:0.9", min_prompt=0)
    given, _ = asked(selection=selection)
    first, memo = selection.choose(given), selection.prompt_units(given.prompts.prompt_lens[0]).memo
    held = StoredChoices(
        torch.full((3, *first.units.shape[1:]), -1, dtype=torch.int32),
        torch.full((3, first.units.shape[1], memo), -1, dtype=torch.int32),
        torch.tensor([2]),
        torch.tensor([False]),
    )
    given.prompts.held = held
    assert selection.choose(given).units is None
    assert torch.equal(held.units[2], first.units[0]) and (held.units[:2] == -1).all()
    memo, marked = held.memo.clone(), held.units.clone()
    held.units[2, :, 0], held.known = 5, torch.tensor([True])
    marked[2, :, 0] = 5
    selection.choose(given)  # the coarsest choice is unchanged, so the stored choice is kept, whatever it is
    assert torch.equal(held.units, marked) and torch.equal(held.memo, memo) and (memo[2] >= 0).all()
    given.q = -given.q
    selection.choose(given)
    assert not torch.equal(held.units[2], first.units[0]) and not torch.equal(held.memo, memo)
    assert not selection.keeps(1)
    every = WaveFilter(reselect="every:3")
    assert [every.keeps(n) for n in range(1, 7)] == [True, True, False] * 2
    assert WaveFilter(reselect="refresh").keeps(1000)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("wavelet", "mexh"), ("levels", 5), ("proportions", [0.4]*3), ("proportions", 0), ("proportions", ["a", "b"]),
        ("budget", 0), ("normalization", "l1"), ("head_mode", "all"), ("agg", "median"), ("detail_lambda", -1),
        ("reselect", "sometimes"), ("reselect", "every:0.5"), ("granularity", "word"), ("keep_sink", -1),
        ("min_prompt", "x"), ("nonsense", 1), ("preset", "fast"),
    ],
)  # fmt: skip
def test_wrong_fields_are_named(field, value):
    with pytest.raises(OptionError, match=field):
        server_options({"selection": {"name": "wavefilter", field: value}}, "random")


def test_short_prompts_and_full_proportions_leave_nothing_out():
    assert not WaveFilter().applies(511, 1000) and WaveFilter().applies(512, 1000)
    assert not WaveFilter(proportions=1.0).applies(4096, 5000)
    assert not WaveFilter(proportions=(1, 1)).applies(4096, 5000)


def test_pins_take_an_eighth_of_what_is_kept():
    serve = server_options({"selection": {"name": "wavefilter", "preset": "serve"}}, "random").selection
    assert serve.pinned(4096) == (16, 64)
    sink, tail = serve.pinned(256)
    assert 3 <= sink + tail <= serve.kept(64)[-1] / 8
