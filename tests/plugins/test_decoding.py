"""The host half of decoding: schedules, and which proposals are committed."""

import numpy as np
import pytest
import torch

from vllm_dlm.methods import methods
from vllm_dlm.options import OptionError, request_options, server_options
from vllm_dlm.plugins.decoding.base import LogitRows, Proposal, Turn
from vllm_dlm.plugins.decoding.entropy import Entropy
from vllm_dlm.plugins.decoding.entropy_bounded import EntropyBounded
from vllm_dlm.plugins.decoding.hierarchy import Hierarchy
from vllm_dlm.plugins.decoding.local_leap import LocalLeap
from vllm_dlm.plugins.decoding.low_confidence import LowConfidence
from vllm_dlm.plugins.decoding.origin import Origin

RNG = np.random.default_rng(0)


def proposal(*prob: float) -> Proposal:
    prob = np.array(prob)
    return Proposal(np.arange(len(prob)), prob, prob)


def chosen(decoding, prob, quota=1, step=0, steps=4, positions=None) -> list[int]:
    positions = np.arange(len(prob)) if positions is None else np.array(positions)
    return sorted(decoding.choose(proposal(*prob), Turn(step, steps, quota, positions), lambda: RNG).tolist())


@pytest.mark.parametrize("name", sorted(methods("decoding")))
@pytest.mark.parametrize(("masks", "steps"), [(32, 32), (32, 16), (30, 12), (7, 3), (5, 20), (1, 1)])
def test_quotas_fill_the_block(name, masks, steps):
    quotas = methods("decoding")[name]().quotas(masks, steps)
    assert all(quota > 0 for quota in quotas) and len(quotas) <= steps
    if name != "origin":  # fills at random: its quotas only define the number of steps
        assert sum(quotas) == masks


def test_llada_deals_the_remainder_first():
    assert LowConfidence().quotas(10, 4) == [3, 3, 2, 2]


def test_dream_fills_nothing_first_and_two_last():
    quotas = Entropy().quotas(32, 32)
    assert len(quotas) == 31 and quotas[-1] == 2  # the empty first step needs no forward


def test_blocks_and_their_steps():
    decoding = LowConfidence(block_length=8, steps=7)
    assert decoding.blocks(20) == [(0, 8), (8, 16), (16, 20)]
    assert [decoding.block_steps(block, 3, 8) for block in range(3)] == [3, 2, 2]


def test_threshold_takes_all_at_least_as_probable_and_always_one():
    decoding = LowConfidence(threshold=0.9)
    assert chosen(decoding, [0.2, 0.95, 0.9, 0.89]) == [1, 2]
    assert chosen(decoding, [0.2, 0.3, 0.1]) == [1]


def test_dream_threshold_keeps_the_step_budget():
    assert chosen(Entropy(threshold=0.5, steps=8), [0.9, 0.8, 0.7, 0.6], quota=2) == [0, 1]
    assert chosen(Entropy(threshold=0.5), [0.9, 0.8, 0.7, 0.6], quota=2) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("factor", "prob", "wanted"),
    [
        (1.0, [0.99, 0.99, 0.99], [0, 1, 2]),  # (n + 1)(1 - p) stays below the factor
        (1.0, [0.9, 0.5, 0.4], [0]),  # the second needs 1 - 1/3
        (1.0, [0.1, 0.05, 0.01], [0]),  # the first is always taken
        (1.0, [0.9, 0.8, 0.1], [0, 1, 2]),  # the reference takes the last one even if it alone fails
    ],
)
def test_factor_rule(factor, prob, wanted):
    assert chosen(LowConfidence(factor=factor), prob) == wanted


@pytest.mark.parametrize(
    ("prob", "positions", "wanted"),
    [
        ([0.95, 0.8, 0.7, 0.8], [3, 4, 5, 8], [0, 1]),  # at a distance of 5 no position is relaxed
        ([0.8, 0.1, 0.9, 0.8, 0.75], [0, 1, 4, 8, 9], [0, 2, 3]),
        ([0.95, 0.8, 0.8, 0.92], [10, 15, 17, 20], [0, 2, 3]),  # the nearest anchor counts, on either side
        ([0.8, 0.89, 0.8], [0, 1, 2], [1]),  # no anchor: only the best
    ],
)
def test_leaps_beside_anchors(prob, positions, wanted):
    assert chosen(LocalLeap(), prob, positions=positions) == wanted


def test_leaps_are_those_of_the_statement():
    rng = np.random.default_rng(5)
    for _ in range(200):
        count = int(rng.integers(1, 40))
        prob, positions = rng.random(count), np.sort(rng.choice(80, count, replace=False))
        decoding = LocalLeap(kappa=rng.random(), tau=rng.random(), radius=int(rng.integers(0, 9)))
        anchors = [i for i in range(count) if prob[i] >= decoding.kappa]
        near = [
            j
            for j in range(count)
            if prob[j] >= decoding.tau and any(abs(positions[i] - positions[j]) <= decoding.radius for i in anchors)
        ]
        wanted = sorted({*anchors, *near}) or [int(prob.argmax())]
        assert chosen(decoding, prob, positions=positions) == wanted


@pytest.mark.parametrize(
    ("fields", "prob", "positions", "wanted"),
    [
        ({}, [0.3, 0.5, 0.45, 0.2, 0.41], [0, 1, 2, 5, 6], [1, 4]),
        ({}, [0.3, 0.35, 0.2], [0, 1, 5], [1]),  # `low` never excludes the best position
        ({}, [0.95, 0.91, 0.5], [0, 1, 2], [0, 1]),
        ({"high": None}, [0.95, 0.91, 0.5], [0, 1, 2], [0]),
        ({"low": None}, [0.1, 0.2, 0.05], [0, 1, 5], [1, 2]),
        ({"low": 0.5}, [0.5, 0.6], [0, 5], [1]),  # more probable than low
        ({}, [0.5, 0.5, 0.5], [0, 1, 3], [0, 1, 2]),  # ties within a run are filled together
        ({"threshold": 0.8}, [0.95, 0.85, 0.1], [0, 1, 2], [0, 1]),  # a server's threshold counts as well
    ],
)
def test_runs_are_split_at_their_best(fields, prob, positions, wanted):
    assert chosen(Hierarchy(**fields), prob, positions=positions) == wanted


def test_ties_go_to_the_lowest_position():
    assert chosen(LowConfidence(), [0.5, 0.7, 0.7, 0.7], quota=2) == [1, 2]


def test_algorithm_temperature_draws_without_replacement():
    decoding = Entropy(algorithm_temperature=1.0)
    draws = [tuple(chosen(decoding, [0.0, 0.0, 0.0, -50.0], quota=2)) for _ in range(200)]
    assert set(draws) == {(0, 1), (0, 2), (1, 2)}


def test_origin_ends_with_everything():
    assert chosen(Origin(), [0.1, 0.2, 0.3], step=3, steps=4) == [0, 1, 2]


class TestOptions:
    def test_presets_by_name(self):
        server = server_options({"reuse": {"name": "dllm_cache", "transfer_ratio": 0.5}}, "low_confidence")
        reuse = request_options(server, {"dlm_reuse": "dllm_cache/dream-base-mbpp"}).reuse
        assert (reuse.prompt_interval, reuse.response_interval, reuse.transfer_ratio) == (25, 8, 0.5)
        with pytest.raises(OptionError, match=r"no preset 'mbpp'.*dream-base-mbpp"):
            request_options(server, {"dlm_reuse": "dllm_cache/mbpp"})

    def test_a_request_changes_only_what_it_names(self):
        server = server_options({"decoding": {"name": "low_confidence", "block_length": 8}}, "entropy")
        changed = request_options(server, {"dlm_steps": 4, "dlm_decoding": "random", "other": 1}).decoding
        assert (changed.name, changed.block_length, changed.steps) == ("random", 8, 4)

    @pytest.mark.parametrize(
        ("given", "field"),
        [
            ({"reuse": {"name": "fast_dllm", "cache": "triple"}}, "cache"),
            ({"reuse": {"name": "dllm_cache", "transfer_ratio": 1.5}}, "transfer_ratio"),
            ({"reuse": {"name": "dyllm", "full_steps": 0}}, "full_steps"),
            ({"decoding": {"steps": 1.5}}, "steps"),
            ({"selection": {"name": "keyhole"}}, "unique"),
            ({"decoding": {"threshold": 1.5}}, "dlm.decoding.threshold: 1.5.*between 0 and 1"),
            ({"decoding": {"name": "entropy", "top_p": 0}}, "dlm.decoding.top_p"),
            ({"decoding": {"top_k": 5}}, "top_k: not a field of 'low_confidence'"),
            ({"canvas": {"default": 0}}, "dlm.canvas.default"),
            ({"canvas": {"default": 9, "max": 8}}, "dlm.canvas.default: 9.*at most max, 8"),
            ({"canvas": {"min": 8}}, "dlm.canvas.min.*default, max"),
            ({"canvas": 8}, "dlm.canvas: 8 is not an object"),
            ([], "dlm"),
        ],
    )
    def test_wrong_fields_are_named(self, given, field):
        with pytest.raises(OptionError, match=field):
            server_options(given, "low_confidence")

    def test_a_canvas_nobody_asked_for(self):
        canvas = server_options({"canvas": {"max": 40}}, "entropy").canvas
        assert (canvas.length(256), canvas.length(32)) == (40, 32)
        assert server_options({"canvas": {"default": 64}}, "entropy").canvas.length(256) == 64
        assert server_options(None, "entropy").canvas.length(256) == 256

    @pytest.mark.parametrize(
        ("given", "wanted"),
        [
            ({"dlm_threshold": "none"}, {"threshold": None, "factor": None, "name": "low_confidence"}),
            ({"dlm_threshold": "none", "dlm_factor": 1}, {"threshold": None, "factor": 1.0}),
            ({"dlm_decoding": "random", "dlm_threshold": "none"}, {"threshold": None, "name": "random"}),
            ({"dlm_steps": "none", "dlm_block_length": "none"}, {"steps": None, "block_length": None}),
        ],
    )
    def test_none_unsets_what_the_server_set(self, given, wanted):
        server = server_options({"decoding": {"threshold": 0.9, "steps": 64, "block_length": 8}}, "low_confidence")
        decoding = request_options(server, given).decoding
        assert {field: getattr(decoding, field) for field in wanted} == wanted

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"dlm_factor": 1.0}, 'dlm_factor: 1.0 .*unset when threshold is set; .*dlm_threshold: "none" unsets it'),
            (
                {"dlm_decoding": "random"},
                "dlm_decoding: 'random' cannot be combined .*dlm_threshold: \"none\" unsets it",
            ),
            ({"dlm_suppress_eos": "none"}, "dlm_suppress_eos: 'none' is not valid, it must be bool"),
            ({"dlm_threshold": "off"}, "dlm_threshold: 'off' is not valid, it must be float or \"none\""),
            ({"dlm_infill": 2}, "dlm_infill: 2 is not valid, it must be bool"),
        ],
    )
    def test_what_stands_in_the_way_is_said(self, given, message):
        server = server_options({"decoding": {"threshold": 0.9}}, "low_confidence")
        with pytest.raises(OptionError, match=message):
            request_options(server, given)

    @pytest.mark.parametrize(
        "key",
        [
            pytest.param("dlm_" + "x" * 10**6, id="long name"),
            *("dlm_steps", "dlm_decoding", "dlm_reuse", "dlm_selection", "dlm_infill"),
        ],
    )
    @pytest.mark.parametrize("value", ["y" * 10**6, ["y" * 10**6], 10**4000], ids=["text", "list", "number"])
    def test_long_wrong_values_do_not_come_back(self, key, value):
        with pytest.raises(OptionError, match=key[:40]) as refused:
            request_options(server_options(None, "low_confidence"), {key: value})
        assert len(str(refused.value)) < 500

    def test_dream_filters_its_confidence_with_its_own_top_p_and_top_k(self):
        server = server_options(None, "entropy")
        assert request_options(server, {}).decoding.filters(0.9, 7) == (0.9, 7)
        assert request_options(server, {"dlm_top_p": 0.5}).decoding.filters(1.0, 0) == (0.5, 0)
        assert request_options(server, {"dlm_top_p": 1, "dlm_top_k": 3}).decoding.filters(0.9, 7) == (1.0, 3)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 10**400])
@pytest.mark.parametrize("field", ["factor", "threshold", "cfg_scale", "steps"])
def test_numbers_without_an_end_are_refused_by_name(field, value):
    server = server_options(None, "low_confidence")
    with pytest.raises(OptionError, match=f"dlm_{field}") as refused:
        request_options(server, {f"dlm_{field}": value})
    assert len(str(refused.value)) < 300


def test_a_threshold_falls_with_masks_and_load():
    rule = LowConfidence(threshold=0.9, threshold_decay=0.4)
    assert rule.limit(Turn(0, 9, 1, None, 0.5)) == 0.9  # a block's first step
    assert rule.limit(Turn(1, 9, 1, None, 0.5)) == pytest.approx(0.9 * 0.8)
    rule = LowConfidence(threshold=0.9, threshold_floor=0.6)
    assert [rule.limit(Turn(1, 9, 1, None, 1.0, busy)) for busy in (0.0, 0.5, 1.0)] == pytest.approx([0.9, 0.75, 0.6])
    with pytest.raises(ValueError, match=r"threshold_floor: 0\.95 is not valid, it must be between 0 and 0\.9"):
        LowConfidence(threshold=0.9, threshold_floor=0.95)
    with pytest.raises(ValueError, match=r"threshold_floor: 0\.5 is not valid, it must be unset without a threshold"):
        LowConfidence(threshold_floor=0.5)


def test_entropies_stay_below_their_bound():
    """Fills the positions of lowest entropy whose sum stays below the bound, and at least one."""
    rng = np.random.default_rng(8)
    for _ in range(200):
        entropy, bound = rng.exponential(0.2, int(rng.integers(1, 30))), rng.exponential(0.5)
        rule = EntropyBounded(eb_threshold=bound)
        order = sorted(range(len(entropy)), key=lambda index: entropy[index])
        wanted = [index for count, index in enumerate(order) if not count or sum(entropy[order[: count + 1]]) < bound]
        proposal = Proposal(np.zeros(len(entropy), np.int64), -entropy, np.full(len(entropy), 0.5))
        assert sorted(rule.choose(proposal, Turn(0, 9, 1, np.arange(len(entropy))), lambda: None)) == sorted(wanted)


def test_entropies_are_those_of_the_plain_distribution():
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(2)) * 4
    logits[3, 10:] = -torch.inf
    prob = logits.double().softmax(-1)
    wanted = -torch.special.entr(prob).sum(-1)
    off, no = torch.zeros(7), torch.zeros(7, dtype=torch.bool)
    rows = LogitRows(
        temperature=off,
        top_p=off + 1,
        top_k=off.long() + 50,
        eos_id=3,
        eot_id=None,
        mask_id=49,
        sampled=False,
        options={"suppress_eos": no, "confidence_eos_eot_inf": no},
        filtered=False,
        exponential=None,
        uniform=None,
        memory={},
    )
    got = EntropyBounded.propose(logits.clone(), rows)
    torch.testing.assert_close(got.score.double(), wanted, atol=1e-5, rtol=1e-5)
