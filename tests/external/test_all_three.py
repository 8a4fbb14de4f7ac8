"""A reuse policy, a selection and a decoding that are no part of this package, all together in one engine: they pass
the matrix that the package's own methods pass, next to those and with each other."""

import pytest
from vllm import SamplingParams

from tests.engine.matrix import assert_answers_are_those_alone, assert_exact, combinations, small
from tests.engine.running import Counted, Recorder, tokens
from tests.external.distribution import installed
from tests.tiers import slow
from vllm_dlm.methods import methods

POINTS = {"a": "quest_pages:Quest", "b": "delayed_cache:DelayedCache", "c": "calibrated:Calibrated"}
CHECKPOINTS = ["llada-tiny", "dream-tiny"]


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    with installed(tmp_path_factory.mktemp("distribution"), POINTS) as environment:
        yield environment


@pytest.mark.parametrize("wanted", [{"delayed_cache", "calibrated"}, *slow(set())], ids=["each", "all"])
@pytest.mark.parametrize("checkpoint", ["dream-tiny", *slow("llada-tiny")])
def test_answers_are_those_alone(engines, checkpoint, wanted):
    llm = engines(checkpoint, additional_config={"dlm": {"selection": small("selection", "quest")}})
    given = [request for request in combinations("quest") if not wanted or wanted & names_in(request)]
    assert {"quest", "delayed_cache", "calibrated"} <= set().union(*map(names_in, given))
    assert_answers_are_those_alone(llm, given)


def names_in(request) -> set:
    return set(request[1].extra_args.values())


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_the_policy_is_exact_where_it_says_so(engines, checkpoint):
    assert_exact(engines, checkpoint, "delayed_cache")


def asked(**extra):
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False, extra_args=extra)
    return {"prompt_token_ids": list(range(5, 65))}, params


def test_the_policy_lives_on_few_rows_and_skips_ffns(engines):
    llm = engines("llada-tiny")
    with Counted(llm) as counted:
        tokens(llm, [asked(dlm_reuse="delayed_cache", dlm_block_length=24)])
    layers = llm.llm_engine.model_config.hf_config.num_hidden_layers
    rows = [step.rows["query"] for step in counted.steps]
    assert rows[0] == rows[8] == rows[16] == 84 * layers
    # after step s the s masked rows fewer live, and the one just filled
    assert [count // layers for count in rows[1:8]] == [24 - step + 1 for step in range(1, 8)]
    partial = [step for index, step in enumerate(counted.steps) if index % 8]
    assert sum(s.rows["feed_forward"] for s in partial) < sum(s.rows["query"] for s in partial)


def test_a_field_of_the_decoding_reaches_each_row(engines):
    """Two requests of one batch, one of which reads its confidences at a high temperature."""
    llm = engines("llada-tiny")
    sharp, flat = (asked(dlm_decoding="calibrated", dlm_calibration=value, dlm_threshold=0.9) for value in (0.05, 5.0))
    with Recorder(llm) as recorder:
        both = tokens(llm, [sharp, flat])
    steps = sorted(len(found) for found in recorder.steps.values())
    assert steps[0] < 24 == steps[1]  # a threshold that flat confidences never reach fills one position a step
    assert both == [tokens(llm, [request])[0] for request in (sharp, flat)]
    plain = asked(dlm_decoding="low_confidence")
    assert tokens(llm, [asked(dlm_decoding="calibrated")]) == tokens(llm, [plain])


def test_wrong_fields_are_refused_by_name(engines):
    with pytest.raises(ValueError, match=r"dlm_calibration: -1\.0 is not valid, it must be greater than 0"):
        tokens(engines("llada-tiny"), [asked(dlm_decoding="calibrated", dlm_calibration=-1.0)])
    assert "quest" in methods("selection")
