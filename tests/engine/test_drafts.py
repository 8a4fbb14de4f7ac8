"""Guesses at the next steps, verified in one forward: fewer steps and the same texts, whoever shares the batch."""

import random

import pytest
from vllm import SamplingParams

from tests.engine.running import Watching, interrupted, runner_of, tokens
from tests.engine.test_extent import SCARCE
from vllm_dlm.canvas.speculation import Speculation
from vllm_dlm.integration.scheduler.scheduler import FULL


class Canvases(Watching):
    """Forwards of requests, and rows of the largest step that has drafts."""

    def __enter__(self):
        self.steps = self.drafts = 0
        return super().__enter__()

    def step_ended(self, requests, counts):
        self.steps += len(requests)
        self.drafts += sum(len(request.added_by(Speculation.name)) for request in requests)


def given(count: int, drafts: int, new: int = 24, **more):
    rng = random.Random(count)
    for _ in range(count):
        extra = {
            "dlm_decoding": "freedave",
            "dlm_drafts": drafts,
            "dlm_reuse": "fast_dllm/dual",
            "dlm_block_length": 8,
        }
        params = SamplingParams(
            temperature=0, max_tokens=rng.randint(1, new), ignore_eos=True, detokenize=False, extra_args=extra | more
        )
        yield {"prompt_token_ids": [rng.randrange(390) for _ in range(rng.randint(1, 60))]}, params


@pytest.mark.parametrize("checkpoint", ["llada-tiny", "llada-calm", "dream-tiny"])
@pytest.mark.parametrize("more", [{}, {"dlm_window": 4}], ids=["full", "window"])
def test_texts_are_those_of_one_token_a_step(engines, checkpoint, more):
    llm = engines(checkpoint)
    with Canvases(llm) as one:
        wanted = tokens(llm, list(given(12, 1, **more)))
    with Canvases(llm) as several:
        alone = [tokens(llm, [request])[0] for request in given(12, 8, **more)]
    assert alone == wanted and not one.drafts and several.drafts and several.steps < 0.9 * one.steps
    for cache in runner_of(llm).kv_caches:
        cache.fill_(float("nan"))
    assert tokens(llm, list(given(12, 8, **more))) == wanted


def test_a_full_step_has_no_drafts(engines):
    """Rows that drafts may have are those left of a step; texts do not depend on it."""
    llm = engines("llada-tiny")
    many = list(given(FULL // 8, 4, new=16))
    with Canvases(llm) as crowded:
        together = tokens(llm, many)
    with Canvases(llm) as alone:
        assert [tokens(llm, [request])[0] for request in many] == together
    assert crowded.drafts < alone.drafts / 2


def test_drafts_give_way_to_what_they_do_not_go_with(engines):
    """Guidance, selections, log-probabilities, temperature, and policies that recompute more than the block."""
    llm = engines("llada-tiny")
    plain = next(given(1, 4))
    for fields, more in (
        ({}, {"dlm_cfg_scale": 0.5}),
        ({"logprobs": 1}, {}),
        ({"temperature": 0.7, "seed": 1}, {}),
        ({}, {"dlm_reuse": "fast_dllm/prefix"}),
        ({}, {"dlm_reuse": "dllm_cache"}),
        ({}, {"dlm_reuse": "none"}),
    ):
        prompt, params = plain
        params = SamplingParams(
            max_tokens=16,
            ignore_eos=True,
            detokenize=False,
            extra_args=params.extra_args | more,
            **({"temperature": 0} | fields),
        )
        with Canvases(llm) as seen:
            tokens(llm, [(prompt, params)])
        assert not seen.drafts and seen.steps == 16


def test_preemption(engines):
    wanted = tokens(engines("llada-tiny"), list(given(10, 1, new=48, dlm_window=4)))
    llm = engines("llada-tiny", **SCARCE)
    requests = list(given(10, 4, new=48, dlm_window=4))
    assert tokens(llm, requests) == wanted
    assert [tokens_of for ((tokens_of, *_),) in interrupted(llm, requests, 7)] == wanted


def test_what_drafts_take_is_refused_by_name(engines):
    llm = engines("llada-tiny", **SCARCE)
    params = SamplingParams(
        max_tokens=100, extra_args={"dlm_decoding": "freedave", "dlm_drafts": 64, "dlm_reuse": "fast_dllm/dual"}
    )
    with pytest.raises(ValueError, match="dlm_drafts: 64 is not supported: a canvas of 101 tokens takes 7 blocks"):
        tokens(llm, [({"prompt_token_ids": [7]}, params)])
    with pytest.raises(ValueError, match="dlm_drafts: 0 is not valid, it must be between 1 and 64"):
        tokens(llm, [({"prompt_token_ids": [7]}, SamplingParams(extra_args=params.extra_args | {"dlm_drafts": 0}))])
    with pytest.raises(ValueError, match="dlm_steps: 5 is not valid, it must be unset"):
        tokens(llm, [({"prompt_token_ids": [7]}, SamplingParams(extra_args=params.extra_args | {"dlm_steps": 5}))])
