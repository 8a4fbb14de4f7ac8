"""The host half of decoding: schedules, and which proposals are committed."""

import numpy as np
import pytest

from vllm_dlm.methods import methods
from vllm_dlm.options import OptionError, request_options, server_options
from vllm_dlm.plugins.decoding.base import Proposal, Turn
from vllm_dlm.plugins.decoding.entropy import Entropy
from vllm_dlm.plugins.decoding.low_confidence import LowConfidence
from vllm_dlm.plugins.decoding.origin import Origin

RNG = np.random.default_rng(0)


def proposal(*prob: float) -> Proposal:
    prob = np.array(prob)
    return Proposal(np.arange(len(prob)), prob, prob)


def chosen(decoding, prob, quota=1, step=0, steps=4) -> list[int]:
    return sorted(decoding.choose(proposal(*prob), Turn(step, steps, quota), RNG).tolist())


@pytest.mark.parametrize("name", sorted(methods("decoding")))
@pytest.mark.parametrize(("masks", "steps"), [(32, 32), (32, 16), (30, 12), (7, 3), (5, 20), (1, 1)])
def test_quotas_fill_the_block(name, masks, steps):
    quotas = methods("decoding")[name]().quotas(masks, steps)
    assert all(quota > 0 for quota in quotas) and len(quotas) <= steps
    if name != "origin":  # tosses coins: its quotas only count the steps
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
        with pytest.raises(OptionError, match="no preset 'mbpp'.*dream-base-mbpp"):
            request_options(server, {"dlm_reuse": "dllm_cache/mbpp"})

    def test_a_request_changes_only_what_it_names(self):
        server = server_options({"decoding": {"name": "low_confidence", "block_length": 8}}, "entropy")
        changed = request_options(server, {"dlm_steps": 4, "dlm_algorithm": "random", "other": 1}).decoding
        assert (changed.name, changed.block_length, changed.steps) == ("random", 8, 4)

    @pytest.mark.parametrize(
        ("given", "field"),
        [
            ({"reuse": {"name": "fast_dllm", "cache": "triple"}}, "cache"),
            ({"reuse": {"name": "dllm_cache", "transfer_ratio": 1.5}}, "transfer_ratio"),
            ({"reuse": {"name": "dyllm", "full_steps": 0}}, "full_steps"),
            ({"decoding": {"steps": 1.5}}, "steps"),
            ({"selection": {"name": "keyhole"}}, "unique"),
            ([], "dlm"),
        ],
    )
    def test_wrong_fields_are_named(self, given, field):
        with pytest.raises(OptionError, match=field):
            server_options(given, "low_confidence")
