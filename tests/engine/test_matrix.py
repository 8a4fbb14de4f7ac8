"""Every decoding with every reuse with every selection, from the registry: a method joins by being registered."""

import pytest

from tests.engine.drawn import drawn
from tests.engine.matrix import assert_answers_are_those_alone, assert_exact, combinations, small
from tests.engine.running import all_blocks_are_free, answers, interrupted
from tests.tiers import in_turn, slow
from vllm_dlm.methods import methods

CHECKPOINTS = ["llada-tiny", "dream-tiny"]
BLOCK_CAUSAL = ["sdar-tiny", "llada2-tiny"]
SPARSE = sorted(name for name, selection in methods("selection").items() if selection.sparse)
#: hardly any memory: of 32 tokens
TIGHT = {"block_size": 32, "num_gpu_blocks_override": 24, "max_num_batched_tokens": 256}


def selecting(engines, checkpoint, selection, **settings):
    dlm = {"selection": small("selection", selection)}
    return engines(checkpoint, additional_config={"dlm": dlm}, **settings)


@pytest.mark.parametrize("presets", [False, *slow(True)], ids=["policies", "presets"])
@pytest.mark.parametrize(
    "checkpoint, selection",
    [*in_turn(CHECKPOINTS, SPARSE), *slow(("lladamoe-tiny", "none"), ("lladamoe-tiny", "unique"))],
)
def test_answers_are_those_alone(engines, checkpoint, selection, presets):
    llm = selecting(engines, checkpoint, selection)
    assert_answers_are_those_alone(llm, list(combinations(selection, presets)))


@pytest.mark.parametrize("count", [16, *slow(64)])
@pytest.mark.parametrize(
    "checkpoint, selection", [*in_turn(CHECKPOINTS, SPARSE[::-1]), *in_turn(BLOCK_CAUSAL, ["none", *SPARSE[:1]])]
)
def test_drawn_requests_are_answered_as_alone(engines, checkpoint, selection, count):
    """With suffixes, texts to start from, templates, samples, stops and log-probabilities."""
    llm = selecting(engines, checkpoint, selection)
    assert_answers_are_those_alone(llm, drawn(llm, count, f"{checkpoint} {selection}"))


@pytest.mark.parametrize("presets", [False, *slow(True)], ids=["policies", "presets"])
@pytest.mark.parametrize("checkpoint", ["dream-tiny", *slow("llada-tiny")])
def test_answers_are_those_alone_behind_masks_of_a_prompt(engines, checkpoint, presets):
    """They compete with those of the first block, and partial steps of some policies have no rows for them."""
    llm = engines(checkpoint)
    mask = llm.model_config.hf_config.mask_token_id
    given = [
        ({"prompt_token_ids": [mask] * 5 + prompt["prompt_token_ids"][:9]}, params)
        for prompt, params in combinations("none", presets)
    ]
    assert_answers_are_those_alone(llm, given)


@pytest.mark.parametrize("reuse", sorted(name for name, cls in methods("reuse").items() if cls.exact is not None))
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_exact_reuse_is_none(engines, checkpoint, reuse):
    assert_exact(engines, checkpoint, reuse)


@pytest.mark.parametrize("checkpoint", [*CHECKPOINTS, *BLOCK_CAUSAL[:1], *slow(*BLOCK_CAUSAL[1:])])
def test_whoever_loses_its_caches_begins_its_block_again(engines, checkpoint):
    """Without reuse: a policy that caches recomputes rows sooner then, which changes what it finds."""
    llm = engines(checkpoint)
    given = drawn(llm, 16, checkpoint, dlm_reuse="none")
    undisturbed = answers(llm, given)
    for steps in ([1], [3, 9]):
        assert interrupted(llm, given, *steps) == undisturbed


@pytest.mark.parametrize("checkpoint", ["llada-tiny", *slow("dream-tiny")])
def test_little_memory(engines, checkpoint):
    """Requests wait for others. (test_extent.py and test_block_selection.py have those that give up their memory.)"""
    llm = engines(checkpoint)
    given = drawn(llm, 24, checkpoint, dlm_extent="full", dlm_window=None)
    wanted, tight = answers(llm, given), engines(checkpoint, **TIGHT)
    assert answers(tight, given) == wanted
    assert all_blocks_are_free(tight)
