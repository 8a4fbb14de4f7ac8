"""Engines of tests that share a model are what they would be if each had been started with its options."""

import pytest
from vllm import SamplingParams

from tests.engine.matrix import small
from tests.engine.running import tokens
from tests.engines import start_engine

DLM = {
    "decoding": {"name": "low_confidence", "threshold": 0.05, "block_length": 6},
    "reuse": {"name": "fast_dllm", "cache": "dual"},
    "selection": small("selection", "unique"),
    "extent": {"name": "window", "window": 2},
    "canvas": {"default": 20},
}


def answers(llm) -> tuple:
    """Options, defaults, and the tokens of a request that leaves everything to the server"""
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    got = tokens(llm, [({"prompt_token_ids": list(range(5, 95))}, params)])
    default = llm.generate({"prompt_token_ids": [7, 8, 9]}, use_tqdm=False)[0].outputs[0].token_ids
    return llm.model_config.dlm_options, llm.get_default_sampling_params(), got, len(default)


def test_options_are_those_of_a_start(engines):
    plain, chosen = engines("llada-tiny"), engines("llada-tiny", additional_config={"dlm": DLM})
    first = answers(plain)
    started = engines.started["with options"] = start_engine("llada-tiny", additional_config={"dlm": DLM})
    wanted = answers(started)
    assert answers(chosen) == wanted != first
    assert answers(plain) == first and answers(chosen) == wanted
    with pytest.raises(ValueError, match=r"--dlm-config: dlm\.reuse\.name"):
        engines("llada-tiny", additional_config={"dlm": {"reuse": {"name": "nope"}}})
    assert answers(plain) == first
