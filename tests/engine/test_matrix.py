"""Every decoding with every reuse with every selection, from the registry: a method joins by being registered."""

import pytest

from tests.engine.drawn import answers, drawn
from tests.engine.matrix import assert_exact, assert_tokens_are_those_alone, combinations, small
from tests.engine.running import all_blocks_are_free, poison
from tests.tiers import in_turn, slow
from vllm_dlm.methods import methods

CHECKPOINTS = ["llada-tiny", "dream-tiny"]
SPARSE = sorted(name for name, selection in methods("selection").items() if selection.sparse)


@pytest.mark.parametrize("checkpoint, selection", in_turn(CHECKPOINTS, SPARSE))
def test_tokens_are_those_alone(engines, checkpoint, selection):
    llm = engines(checkpoint, additional_config={"dlm": {"selection": small("selection", selection)}})
    assert_tokens_are_those_alone(llm, list(combinations(selection)))


@pytest.mark.parametrize("count", [12, *slow(24)])
@pytest.mark.parametrize(
    "checkpoint, selection",
    [*in_turn(CHECKPOINTS, SPARSE[::-1]), ("sdar-tiny", "none"), *slow(("llada2-tiny", "none"))],
)
def test_drawn_requests_are_answered_as_alone(engines, checkpoint, selection, count):
    """With suffixes, texts to start from, templates, samples, stops and log-probabilities."""
    llm = engines(checkpoint, additional_config={"dlm": {"selection": small("selection", selection)}})
    given = drawn(llm, count, f"{checkpoint} {selection}")
    together = answers(llm, given)
    assert answers(llm, given[::-3]) == together[::-3]
    poison(llm)
    for one, want in zip(given, together, strict=True):
        assert answers(llm, [one]) == [want], one
    assert all_blocks_are_free(llm)


@pytest.mark.parametrize("checkpoint", ["dream-tiny", *slow("llada-tiny")])
def test_tokens_are_those_alone_behind_masks_of_a_prompt(engines, checkpoint):
    """They compete with those of the first block, and partial steps of some policies have no rows for them."""
    llm = engines(checkpoint)
    mask = llm.model_config.hf_config.mask_token_id
    given = [
        ({"prompt_token_ids": [mask] * 5 + prompt["prompt_token_ids"][:9]}, params)
        for prompt, params in combinations("none")
    ]
    assert_tokens_are_those_alone(llm, given)


@pytest.mark.parametrize("reuse", sorted(name for name, cls in methods("reuse").items() if cls.exact is not None))
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_exact_reuse_is_none(engines, checkpoint, reuse):
    assert_exact(engines, checkpoint, reuse)
