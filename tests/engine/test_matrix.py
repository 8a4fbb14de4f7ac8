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


@pytest.mark.parametrize("reuse", sorted(name for name, cls in methods("reuse").items() if cls.exact is not None))
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_exact_reuse_is_none(engines, checkpoint, reuse):
    assert_exact(engines, checkpoint, reuse)
