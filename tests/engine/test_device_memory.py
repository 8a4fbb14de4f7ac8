"""Memory on the device: what a step sends, what requests leave behind, and what fresh caches hold."""

import gc
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.engine.capture import capturing  # noqa: F401
from tests.engine.running import Watching, runner_of, tokens
from tests.engine.selecting import engine
from tests.engine.test_failures import PLACES, ask, outputs, poisoned
from tests.engine.test_selection import SMALL
from vllm_dlm.cache.budget import BlockShape
from vllm_dlm.canvas.caches import Blocks, StreamCaches
from vllm_dlm.canvas.canvas import NOTHING, Canvas, Commit
from vllm_dlm.canvas.denoising import Denoising, Sampling
from vllm_dlm.canvas.selected_keys import ChoicePool
from vllm_dlm.canvas.stream import Stream
from vllm_dlm.integration.worker import runner as runner_module
from vllm_dlm.options import request_options, server_options
from vllm_dlm.options.texts import Layout
from vllm_dlm.plugins.reuse.base import RowShape, StepPlan, span
from vllm_dlm.plugins.reuse.fast_dllm import FastDLLM
from vllm_dlm.plugins.selection.unique import Unique
from vllm_dlm.request.hole_automata import built
from vllm_dlm.step.buckets import Costs
from vllm_dlm.step.captured import TABLES, CapturedSteps
from vllm_dlm.step.counts import Counts
from vllm_dlm.step.cuda_graphs import repeated
from vllm_dlm.step.denoiser import Denoiser
from vllm_dlm.step.failures import Failures
from vllm_dlm.step.head import Head
from vllm_dlm.step.upload import FIRST_CAPACITY, Upload

VOCABULARY, WIDTH, PROMPT, BLOCK = 152_000, 8, 20, 32
EOS, MASK = 1, 0


# -- what a step sends -----------------------------------------------------------------------


def as_on_a_gpu() -> Upload:
    """Arrays are copied one after the other into memory that is not theirs."""
    upload = Upload(torch.device("cpu"))
    upload._host, upload._there = upload._buffers(FIRST_CAPACITY)
    return upload


def test_arrays_larger_than_the_memory_arrive():
    upload = as_on_a_gpu()
    for _ in range(2):
        arrays = [np.arange(n, dtype=np.int64) for n in (10, 1 << 20, 3, 1 << 21, 5)]
        sent = [upload(array) for array in arrays]
        upload.send()
        for array, tensor in zip(arrays, sent, strict=True):
            assert torch.equal(tensor, torch.from_numpy(array))
    assert upload._capacity <= 2 * sum(array.nbytes for array in arrays)


def templated(number: int) -> Denoising:
    """Between refreshes; every position of its block may hold one token, another one in each request."""
    options = request_options(server_options(None, "low_confidence"), {"dlm_reuse": "fast_dllm"})
    moves = (([token_at(number, index)], ((index, index + 1),)) for index in range(BLOCK))
    chain = built(BLOCK + 1, [0], [BLOCK], moves, VOCABULARY, [EOS])
    layout = Layout(start=[MASK] * BLOCK, holes=[(0, BLOCK, 0)], automata=[chain.plain()], ends=[EOS])
    canvas = Canvas(options, MASK, 0, [7] * PROMPT, PROMPT + BLOCK, layout)
    state = Denoising(f"r{number}", canvas, Sampling(0.0, 1.0, 0, seed=number, stop_ids=frozenset()))
    canvas.apply(Commit(canvas.candidates(), np.full(BLOCK, 0.5, np.float32), NOTHING, NOTHING))
    assert not canvas.plan.refresh
    return state


def token_at(number: int, index: int) -> int:
    return 100 + 1000 * index + number


def test_the_tokens_that_templates_allow_need_not_fit_beside_captured_tables():
    shape, costs = BlockShape(16, 2, 16, RowShape(32, WIDTH)), Costs(1, WIDTH, WIDTH, 4)
    config = SimpleNamespace(vocab_size=VOCABULARY, eos_token_id=EOS, eot_token_id=None, mask_token_id=MASK)
    logits = torch.arange(VOCABULARY, dtype=torch.float32)  # without templates the last token were the best everywhere
    head = Head(lambda hidden: logits.repeat(len(hidden), 1), config, 1 << 23)
    denoiser = Denoiser(None, head, shape, 4096, torch.device("cpu"))
    denoiser.upload = as_on_a_gpu()
    denoiser.captured = captured = CapturedSteps(
        lambda packed, counts: torch.zeros(len(packed.ids), WIDTH),
        repeated,
        shape,
        torch.device("cpu"),
        256,
        4096,
        costs.room(256),
        costs,
    )
    states = [templated(number) for number in range(16)]
    tables = {state.req_id: np.arange(1, 9) for state in states}
    captured.capture_all(states[0].streams(denoiser.caches, tables["r0"])[0])
    replayed, failed = captured.pad, Failures()
    captured.pad = lambda streams: replayed(streams) or pytest.fail("the step is launched")
    assert len(states) * BLOCK * VOCABULARY // 8 > TABLES
    requests = denoiser.step(states, tables, Counts(), failed)
    assert not failed and len(requests) == len(states)
    for number, request in enumerate(requests):
        assert request.proposal.token.tolist() == [token_at(number, index) for index in range(BLOCK)]


# -- what requests leave behind --------------------------------------------------------------


@contextmanager
def without_collection():
    """Cycles of objects are not found."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_choices_are_freed_with_the_requests_that_made_them(engines):
    llm = engine(engines, "llada-tiny", SMALL | {"select_every": 3})
    pools = runner_of(llm).denoiser.caches.pools
    seen = []

    class Pools(Watching):
        def step_ended(self, requests, counts):
            seen.append(sum(len(pool.layers) for pool in pools.values()))

    prompt = {"prompt_token_ids": [7 + index % 300 for index in range(180)]}
    with without_collection(), Pools(llm):
        for _ in range(2):
            tokens(llm, [(prompt, ask(16, dlm_reuse="fast_dllm")[1])])
            assert max(seen) > 0
            tokens(llm, [ask(4)])  # a finished request leaves when the next step is scheduled
            assert not any(pool.layers for pool in pools.values())


def test_a_pool_starts_small_again():
    pool = ChoicePool()
    slots = [pool.slot(4, 0) for _ in range(5)]
    pool.tensors(0, 2, torch.device("cpu"))
    for slot in slots[1:]:
        pool.release(slot)
    assert len(pool.layers[0]) >= 6, "one is in use"
    pool.release(slots[0])
    assert not pool.layers
    assert pool.slot(2, 1) == 1
    units, memo = pool.tensors(0, 2, torch.device("cpu"))
    assert units.shape == (2, 2, 2) and memo.shape == (2, 2, 1)


def test_an_evicted_pool_is_not_mixed_with_its_successor():
    """Views of one group read the pool of the first one: canvases with different pools are not of one kind."""
    caches = StreamCaches(BlockShape(32, 2, 16, RowShape(32, WIDTH)))
    selection = Unique(page_size=16, budget_tokens=64, min_context=0, select_every=3)

    def stream() -> Stream:
        table, tokens = np.arange(1, 9), np.zeros(231, np.int64)
        keys = caches.selected_keys(selection, 200, 231, Blocks(table, NOTHING, table, NOTHING))
        return Stream(FastDLLM(), StepPlan.dense(span(200, 231)), tokens, NOTHING, NOTHING, (200, 231), selected=keys)

    first, second = stream(), stream()
    assert first.kind == second.kind
    for number in range(caches.pools.bound):
        caches.pool(Unique(budget_tokens=1024 + number))
    assert len(caches.pools) == caches.pools.bound
    assert stream().kind != first.kind


def test_positions_are_kept_once():
    """Any number of spans that requests make need the memory of the longest."""
    spans = [span(start, start + 5000) for start in range(1000)]
    assert all(np.shares_memory(spans[-1], part) for part in spans[-100:])
    assert all(part[0] == start and part[-1] == start + 4999 for start, part in enumerate(spans))
    assert not spans[0].flags.writeable and span(3, 3).size == 0


# -- what caches hold ------------------------------------------------------------------------


def test_fresh_caches_hold_no_nan(engines, monkeypatch):
    """FlashAttention multiplies values after a sequence's end by 0."""
    runner = runner_of(engines("llada-tiny"))
    monkeypatch.setattr(runner, "kv_caches", [])
    monkeypatch.setattr(runner.denoiser, "blocks", None)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kwargs: empty(*size, **kwargs).fill_(torch.nan))
    runner.initialize_kv_cache(SimpleNamespace(num_blocks=3))
    assert runner.kv_caches and all((cache == 0).all() for cache in runner.kv_caches)


@pytest.mark.parametrize("reuse", ["fast_dllm", "dllm_cache"])
def test_a_request_that_fails_leaves_no_nan_behind(engines, reuse):
    """The next owner of its blocks may not fill the last one."""
    llm = engines("llada-tiny")
    runner = runner_of(llm)
    for cache in runner.kv_caches:
        cache.zero_()
    with poisoned(PLACES["the embedding"](runner.model).data):
        (output,) = outputs(llm, [ask(dlm_reuse=reuse)])
    assert output.finish_reason == "error"
    assert all(cache.isfinite().all() for cache in runner.kv_caches)


# -- vLLM's workspace ------------------------------------------------------------------------


@pytest.mark.slow
def test_the_workspace_is_locked_once_graphs_have_its_address(engines, capturing, monkeypatch):  # noqa: F811
    from vllm.v1.worker.workspace import (
        current_workspace_manager,
        init_workspace_manager,
        reset_workspace_manager,
    )

    llm = engines("llada-tiny", additional_config={"dlm": {"reuse": {"name": "fast_dllm"}}})
    capturing(llm)  # attention that reads lengths where a GPU's would
    runner, locked = runner_of(llm), []

    def noted(function):
        locked.append(current_workspace_manager().is_locked())
        return repeated(function)

    monkeypatch.setattr(type(runner), "captures", True)
    monkeypatch.setattr(runner_module, "CudaGraphs", lambda device: noted)
    monkeypatch.setattr(runner_module, "device_works", lambda device: None)
    init_workspace_manager(torch.device("cpu"))
    try:
        runner.warm_up()
        assert locked and not any(locked)
        assert current_workspace_manager().is_locked()
    finally:
        reset_workspace_manager()
