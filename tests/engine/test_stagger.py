"""Refreshes are spread over the engine's steps, and nobody waits long for that."""

import numpy as np
import pytest
from vllm import SamplingParams

from tests.engine.running import Watching, tokens
from vllm_dlm.methods import methods
from vllm_dlm.plugins.decoding.base import Proposal

STEPS = 64
STAGGERING = sorted(name for name, reuse in methods("reuse").items() if hasattr(reuse(), "stagger"))


class Refreshes(Watching):
    """Of each engine step: how many requests it advanced, and how many of these refreshed. Only the schedule is looked
    at: in the place of the model something proposes the same token everywhere."""

    def __enter__(self):
        self.steps = []
        self.denoiser._propose = self.propose
        return super().__enter__()

    def __exit__(self, *error):
        del self.denoiser._propose
        super().__exit__(*error)

    def propose(self, prepared, requests, counts, failed):
        for request in requests:
            count = len(request.positions)
            request.proposal = Proposal(np.full(count, 5), np.full(count, 0.5), np.full(count, 0.5))

    def step_begins(self, states):
        self.steps.append((len(states), sum(state.canvas.plan.refresh for state in states)))


def equal(count: int, reuse: dict):
    params = SamplingParams(
        temperature=0,
        max_tokens=STEPS,
        ignore_eos=True,
        detokenize=False,
        extra_args={"dlm_reuse": reuse["name"], "dlm_block_length": 16},
    )
    return [({"prompt_token_ids": [7, 8, 9]}, params)] * count


def served(engines, count: int, reuse: dict):
    llm = engines("llada-tiny", additional_config={"dlm": {"reuse": reuse}}, max_num_batched_tokens=4096)
    with Refreshes(llm) as seen:
        made = tokens(llm, equal(count, reuse))
    assert len(set(made)) == 1 and sum(requests for requests, _ in seen.steps) == count * STEPS
    return seen.steps, made[0]


@pytest.mark.parametrize("count", [8, 32])
@pytest.mark.parametrize("name", STAGGERING)
def test_equal_requests_take_hardly_more_steps_than_one(engines, name, count):
    alone, text = served(engines, 1, {"name": name})
    together, same = served(engines, count, {"name": name})
    assert same == text and len(alone) == STEPS
    assert len(together) <= 1.1 * len(alone)


def test_requests_that_started_together_fall_out_of_step(engines):
    """Eight that refresh every seventh step: seven in eight steps have at most two refreshes, before long."""
    staggered, text = served(engines, 8, {"name": "dllm_cache"})
    at_once, same = served(engines, 8, {"name": "dllm_cache", "stagger": False})
    assert same == text
    assert {refreshes for _, refreshes in at_once} == {0, 8}
    later = [refreshes for _, refreshes in staggered[STEPS // 2 :]]
    assert max(later) < 8 and sum(later) >= 8 * (STEPS // 2) // 7 - 8
