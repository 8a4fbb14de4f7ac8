"""What a server captures when it starts, by one step of each kind that it will need."""

import json

import pytest
import torch

from tests.conftest import GOLDEN
from tests.engine.capture import capturing
from tests.engine.running import runner_of
from tests.tiers import first_of_each, slow
from vllm_dlm.configuration import resolved_options
from vllm_dlm.families import FAMILIES
from vllm_dlm.integration.worker.warm_up import steady_stream, warm_up
from vllm_dlm.options import request_options, server_options
from vllm_dlm.step.buckets import bucket_of, has_budget

__all__ = ["capturing"]  # a fixture

CHECKPOINTS = sorted(path.name for path in (GOLDEN / "checkpoints").iterdir())


def bidirectional(checkpoint: str) -> bool:
    (architecture,) = json.loads((GOLDEN / "checkpoints" / checkpoint / "config.json").read_text())["architectures"]
    return FAMILIES[architecture].attention == "full"


@pytest.mark.parametrize("checkpoint", first_of_each(bidirectional, [(name, name) for name in CHECKPOINTS]))
def test_steps_of_a_server_are_captured_when_it_starts(engines, capturing, checkpoint):
    llm = engines(
        checkpoint, additional_config={"dlm": {"reuse": {"name": "fast_dllm"}}} if bidirectional(checkpoint) else {}
    )
    captured, runner = capturing(llm), runner_of(llm)
    start(llm, resolved_options(runner.vllm_config))
    assert len(captured.pinned) > 5


def start(llm, options, most: int = 1) -> None:
    runner = runner_of(llm)
    with torch.inference_mode():
        warm_up(runner.denoiser, options, runner.model_config.hf_config, runner.max_model_len, most)


def test_a_block_may_be_longer_than_the_responses_of_the_start(engines, capturing):
    llm = engines("sdar-tiny")
    captured = capturing(llm)
    start(llm, request_options(resolved_options(runner_of(llm).vllm_config), {"dlm_block_length": 96}))
    assert captured.pinned


@pytest.mark.parametrize("block", [32, *slow(8)])
def test_what_is_captured_at_start_does_not_depend_on_confidence(engines, capturing, block):
    """Every block is filled in one step: the sixth step opens a block, or the canvas is full before."""
    llm, reuse = engines("llada-tiny"), {"name": "fast_dllm"}
    confident = {"name": "low_confidence", "threshold": 0.0, "block_length": block}
    captured = capturing(llm)
    start(llm, server_options({"reuse": reuse, "decoding": confident}, "low_confidence"))
    assert captured.pinned and not any(bucket.whole for bucket in captured.pinned)
    sure, captured = set(captured.pinned), capturing(llm)
    start(llm, server_options({"reuse": reuse}, "low_confidence"))
    assert set(captured.pinned) == sure


@pytest.mark.parametrize("checkpoint", ["llada-tiny", "dream-tiny"])
@pytest.mark.parametrize(
    "reuse",
    [
        {"name": "dllm_cache"},
        {"name": "dllm_cache", "response_interval": 1},
        {"name": "dllm_cache", "prompt_interval": 2},
        {"name": "dyllm", "full_steps": 40},
        {"name": "dyllm", "whole_interval": 2},
        {"name": "fast_dllm/prefix"},
        {"name": "none"},
    ],
    ids=str,
)
def test_the_most_common_partial_step(engines, checkpoint, reuse):
    runner = runner_of(engines(checkpoint))
    options = server_options({"reuse": reuse}, "low_confidence")
    stream = steady_stream(runner.denoiser, options, runner.model_config.hf_config, runner.max_model_len)
    if reuse["name"] == "none":
        assert stream is None
    else:
        assert not stream.whole and bucket_of([stream]) is not None
        assert not has_budget(stream) or options.reuse.response_interval > 1
