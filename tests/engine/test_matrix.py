"""Every decoding with every reuse with every selection, from the registry: a method joins by being registered."""

import pytest

from tests.engine.matrix import assert_exact, assert_tokens_are_those_alone, combinations, small
from vllm_dlm.methods import methods

CHECKPOINTS = ["llada-tiny", "dream-tiny"]
SPARSE = sorted(name for name, selection in methods("selection").items() if selection.sparse)


@pytest.mark.parametrize("selection", SPARSE)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_tokens_are_those_alone(engines, checkpoint, selection):
    llm = engines(checkpoint, additional_config={"dlm": {"selection": small("selection", selection)}})
    assert_tokens_are_those_alone(llm, list(combinations(selection)))


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_tokens_are_those_alone_behind_masks_of_a_prompt(engines, checkpoint):
    """They compete with those of the first block, and partial steps of some policies have no rows for them."""
    llm = engines(checkpoint)
    mask = llm.model_config.hf_config.mask_token_id
    given = [({"prompt_token_ids": [mask] * 5 + prompt["prompt_token_ids"][:9]}, params)
             for prompt, params in combinations("none")]  # fmt: skip
    assert_tokens_are_those_alone(llm, given)


@pytest.mark.parametrize("reuse", sorted(name for name, cls in methods("reuse").items() if cls.exact is not None))
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_exact_reuse_is_none(engines, checkpoint, reuse):
    assert_exact(engines, checkpoint, reuse)
