"""Reuse policies at their exact settings equal `none`; and requests of all policies share a batch unharmed."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from benchmarks.suites.costs import predict
from tests.engine.batches import CHECKPOINTS
from tests.engine.running import Recorder, Watching, core_of, runner_of, tokens
from tests.tiers import in_turn
from vllm_dlm.cache.budget import BlockShape
from vllm_dlm.canvas.block_causal import BlockCausal
from vllm_dlm.canvas.canvas import NOTHING
from vllm_dlm.canvas.stream import Stream
from vllm_dlm.methods import methods
from vllm_dlm.plugins.reuse.base import Progress, RowShape, StepPlan
from vllm_dlm.plugins.reuse.dllm_cache import DLLMCache
from vllm_dlm.plugins.reuse.fast_dllm import FastDLLM
from vllm_dlm.plugins.reuse.none import Dense
from vllm_dlm.plugins.reuse.sub_block import SubBlock
from vllm_dlm.step.counts import ModelShape
from vllm_dlm.step.packing import pack
from vllm_dlm.step.upload import Upload

EXACT = {
    "dllm_cache (1, 1)": {"name": "dllm_cache", "prompt_interval": 1, "response_interval": 1},
    "dllm_cache (1, 1) parity": {"name": "dllm_cache", "prompt_interval": 1, "response_interval": 1, "parity": True},
    "dllm_cache Kp=1 rho=1": {
        "name": "dllm_cache",
        "prompt_interval": 1,
        "response_interval": 1000,
        "transfer_ratio": 1.0,
    },
    "dyllm all full": {"name": "dyllm", "full_steps": 1000},
    "dyllm refreshed": {"name": "dyllm", "full_steps": 1, "refresh_interval": 1},
}


def engine(engines, checkpoint, reuse, **settings):
    return engines(checkpoint, additional_config={"dlm": {"reuse": reuse}}, **settings)


def requests(count=6, **extra):
    rng = random.Random(5)
    for index in range(count):
        params = SamplingParams(
            temperature=0.7 if index % 2 else 0,
            seed=index,
            max_tokens=24,
            ignore_eos=True,
            detokenize=False,
            extra_args={"dlm_block_length": (8, 24)[index % 2], **extra},
        )
        yield {"prompt_token_ids": [rng.randint(0, 389) for _ in range(rng.randint(1, 90))]}, params


def record(llm, request):
    with Recorder(llm) as recorder:
        got = tokens(llm, [request])
    (steps,) = recorder.steps.values()
    return got, steps


@pytest.mark.parametrize("checkpoint, exact", in_turn(CHECKPOINTS, list(EXACT)))
def test_exact_settings(engines, checkpoint, exact):
    plain, cached = engines(checkpoint), engine(engines, checkpoint, EXACT[exact])
    assert tokens(cached, list(requests())) == tokens(plain, list(requests()))
    for request in list(requests(2)):
        (want, dense_steps), (got, steps) = record(plain, request), record(cached, request)
        assert got == want
        for (_, dense), (_, logits) in zip(dense_steps, steps, strict=True):
            np.testing.assert_allclose(logits, dense, atol=1e-5 * max(1, np.abs(dense).max()))


@pytest.mark.parametrize("exact", ["dllm_cache (1, 1)", "dyllm all full"])
def test_guidance_keeps_two_caches(engines, exact):
    given = list(requests(4, dlm_cfg_scale=1.0))
    assert tokens(engine(engines, "llada-tiny", EXACT[exact]), given) == tokens(engines("llada-tiny"), given)


def test_prefix_is_dual_when_one_block_spans_the_response(engines):
    given = [(prompt, params) for prompt, params in requests(6) if params.extra_args["dlm_block_length"] == 24]
    results = [
        tokens(engine(engines, "llada-tiny", {"name": "fast_dllm", "cache": c}), given) for c in ("prefix", "dual")
    ]
    assert results[0] == results[1]


def test_threshold_zero_fills_a_block_per_forward(engines):
    llm = engine(engines, "llada-tiny", {"name": "fast_dllm"})
    prompt = {"prompt_token_ids": [3, 4, 5]}
    params = SamplingParams(
        temperature=0,
        max_tokens=32,
        ignore_eos=True,
        detokenize=False,
        extra_args={"dlm_block_length": 8, "dlm_threshold": 0.0},
    )
    _, steps = record(llm, (prompt, params))
    assert len(steps) == 4


@pytest.mark.parametrize("name", ["dllm_cache", "dyllm", "fast_dllm"])
def test_resumed_requests_start_full_at_the_same_step(engines, name):
    """A cache reset in the middle: the next plan is a refresh, and the step count goes on from the block's start."""
    llm = engines("llada-tiny")
    core = core_of(llm)
    prompt, params = (
        {"prompt_token_ids": list(range(1, 60))},
        SamplingParams(
            temperature=0,
            max_tokens=32,
            ignore_eos=True,
            detokenize=False,
            extra_args={"dlm_reuse": name, "dlm_block_length": 8},
        ),
    )
    request_id = llm.llm_engine.add_request("r", prompt, params)
    for _ in range(13):
        llm.llm_engine.step()
    assert core.scheduler.reset_prefix_cache(reset_running_requests=True)
    llm.llm_engine.step()
    (state,) = runner_of(llm).requests.values()
    (canvas,) = core.scheduler.canvases.values()
    clocks = [(c.block, c.block_step, c.step) for c in (state.canvas, canvas)]
    assert clocks == [(1, 1, 9)] * 2
    assert request_id is None or state.req_id
    while llm.llm_engine.has_unfinished_requests():
        (output,) = llm.llm_engine.step() or [None]
    assert output.finished and len(output.outputs[0].token_ids) == 32


def progress(block, block_step, step, cold, shift=0) -> Progress:
    tokens, confidence = np.full(72, 392), np.full(72, np.nan, np.float32)
    tokens[:40] = 1
    return Progress(40, 72, block, block_step, step, cold, shift, 392, tokens, confidence, np.zeros(0, np.int64))


@pytest.mark.parametrize("length", [3, 5, 24])
def test_sub_blocks_that_do_not_divide_a_block_lie_inside_of_it(length):
    """In a block-causal model, where all rows before the block are final"""
    block, firsts = (56, 64), set()
    for masked in range(block[0] + 1, block[1]):
        at = replace(progress(block, 1, 9, cold=False), written=block[0])
        at.tokens[:masked] = 1
        live = BlockCausal(8, SubBlock(length=length)).plan(at).live
        assert block[0] <= live[0] <= masked <= live[-1] < block[1]
        firsts.add(int(live[0]))
    assert block[0] in firsts and (length > 8 or len(firsts) > 1)


def test_cold_plans_are_full():
    for reuse in methods("reuse").values():
        assert reuse().plan(progress((48, 56), 3, 11, cold=True)).whole(72)


class TestDLLMCachePlan:
    def at(self, step, shift=0):
        return progress((40, 72), step, step, step == 0, shift)

    def test_schedule(self):
        policy = DLLMCache(prompt_interval=6, response_interval=4)
        kinds = []
        for step in range(13):
            plan = policy.plan(self.at(step))
            kinds.append("PR"[int(plan.live[0] > 0)] + ("r" if len(plan.live) == len(plan.forced) else "."))
        # P: the prompt lives, R: the response alone; r: everything alive is recomputed
        assert kinds == ["Pr", "R.", "R.", "R.", "Rr", "R.", "P.", "R.", "Rr", "R.", "R.", "R.", "Pr"]

    def test_dream_carries_the_row_before_the_response(self):
        plan = DLLMCache().plan(self.at(1, shift=1))
        assert plan.live.tolist() == list(range(39, 72)) and plan.forced.tolist() == [39] and plan.budget == 8


class Predicted(Watching):
    """Counts of every step of a request, and what the cost model says they will be."""

    def __enter__(self):
        self.steps, self.expected = [], None
        return super().__enter__()

    def step_begins(self, states):
        ((canvas),) = (state.canvas for state in states)
        at, plan, reuse = canvas.progress, canvas.plan, canvas.options.reuse
        kept = reuse.feature_rows(at.prompt_len, at.length)
        self.expected = predict(self.shape, reuse, plan, at.length, len(canvas.candidates()), kept)

    def step_ended(self, requests, counts):
        self.steps.append((counts, self.expected))


def test_counted_work_is_the_predicted_work(engines):
    """Rows per projection, query-key pairs and keys read of every step, against the cost model."""
    for reuse in (Dense(), FastDLLM(), DLLMCache(prompt_interval=7, response_interval=3)):
        llm = engine(engines, "llada-tiny", {"name": reuse.name, **vars(reuse)})
        with Predicted(llm) as seen:
            shape = seen.shape = ModelShape.from_config(llm.llm_engine.model_config.hf_config)
            tokens(llm, list(requests(1)))
        assert len(seen.steps) == 24
        for counted, predicted in seen.steps:
            assert counted == predicted
        work = [shape.macs(counted) for counted, _ in seen.steps]
        # Of `none` the head alone becomes cheaper from step to step.
        assert (sum(work) < 0.8 * 24 * work[0]) == (reuse.name != "none")


def test_least_similar_per_canvas():
    reuse, plan = DLLMCache(), StepPlan(np.arange(3), np.arange(1), 1, 2, False)
    streams = [
        Stream(reuse, plan, np.zeros(3, np.int64), NOTHING, NOTHING, (0, 3)),
        Stream(reuse, replace(plan, budget=0), np.zeros(3, np.int64), NOTHING, NOTHING, (0, 3)),
        # a row of a new token is forced, and counts against the budget
        Stream(reuse, replace(plan, budget=2), np.zeros(3, np.int64), NOTHING, np.array([2]), (0, 3)),
    ]
    (group,) = pack(streams, Upload(torch.device("cpu")), BlockShape(16, 2, 8, RowShape(16, 16))).groups
    similarity = torch.tensor([0.9, 0.5, 0.5, 0.0, 0.1, 0.2, 0.9, 0.1, 0.9])
    rows = group.least_similar(similarity)
    assert rows.index.tolist() == [0, 1, 3, 6, 7, 8] and rows.counts == [2, 1, 3]
    assert group.forced.index.tolist() == [0, 3, 6, 8]
