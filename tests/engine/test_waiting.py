"""Who is let in when memory is short: in turn, but a large request may be passed, and only so often."""

import random

import pytest
from vllm import SamplingParams

from tests.engine.running import core_of, tokens
from vllm_dlm.integration.scheduler.scheduler import OVERTAKES
from vllm_dlm.step.counts import StepCounts

BLOCKS = 9  # of 32 tokens, beside the one vLLM keeps for itself
TIGHT = {"block_size": 32, "num_gpu_blocks_override": BLOCKS + 1, "max_num_batched_tokens": 512}
LARGE, SMALL = 8, 1


def request(blocks: int, seed: int, prompt: int = 12):
    """One that needs so many blocks. Small ones take 2 to 8 steps, so that they do not leave together."""
    canvas = 8 if blocks == 1 else 32
    prompt = prompt if blocks == 1 else 32 * blocks - canvas
    extra = {"dlm_block_length": 8, "dlm_steps": 2 + seed % 7 if blocks == 1 else 16}
    fields = {"max_tokens": canvas, "ignore_eos": True, "detokenize": False, "extra_args": extra}
    params = SamplingParams(temperature=seed % 2, seed=seed, **fields)
    return {"prompt_token_ids": [random.Random(seed).randint(0, 389) for _ in range(prompt)]}, params


class Run:
    """Requests "0", "1", … in a tight engine, stepped by hand."""

    def __init__(self, llm):
        self.engine, self.core = llm.llm_engine, llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.started: list[int] = []  # in the order in which they were first let in
        self.done: dict[int, tuple[int, ...]] = {}
        self.given: list = []

    def add(self, *requests, **fields) -> None:
        for prompt, params in requests:
            self.engine.add_request(str(len(self.given)), prompt, params, **fields)
            self.given.append((prompt, params))

    def step(self) -> None:
        for output in self.engine.step():
            if output.finished:
                self.done[int(output.request_id)] = tuple(output.outputs[0].token_ids)
        running = [number(held) for held in self.scheduler.running]
        # the last one let in may have ended in this very step
        self.started += [i for i in sorted({*running, *self.done}) if i not in self.started]

    def finish(self) -> None:
        while self.engine.has_unfinished_requests():
            self.step()
        assert self.core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == BLOCKS
        assert not self.scheduler.canvases and not self.scheduler.overtaken

    def passed(self, index: int) -> int:
        """How many that came later were let in before."""
        return sum(other > index for other in self.started[: self.started.index(index)])

    def as_with_room(self, llm) -> None:
        asked = sorted(self.done)
        assert tokens(llm, [self.given[index] for index in asked]) == [self.done[index] for index in asked]


def number(held) -> int:
    return int(held.request_id.rsplit("-", 1)[0])


@pytest.fixture
def run(engines):
    run = Run(engines("llada-tiny", **TIGHT))
    yield run
    run.finish()


def smalls(count: int, seed: int = 0):
    return [request(SMALL, seed + i, prompt=1 + (seed + i) % 20) for i in range(count)]


def test_small_ones_pass_a_large_one_so_often(engines, run):
    run.add(*smalls(2), request(LARGE, 2), *smalls(OVERTAKES + 20, seed=3))
    run.step()
    assert run.started == [0, 1, *range(3, 3 + BLOCKS - 2)]
    run.finish()
    assert run.passed(2) == OVERTAKES
    assert len(run.done) == OVERTAKES + 23
    run.as_with_room(engines("llada-tiny"))


def test_the_small_ones_are_held_back_no_longer_than_those_run_that_do(run):
    """Once it may not be passed again, nobody is let in before it, and it is as soon as memory allows."""
    run.add(*smalls(2), request(LARGE, 2), *smalls(OVERTAKES + 20, seed=3))
    while run.scheduler.overtaken.total() < OVERTAKES:
        run.step()
    steps = 0
    while 2 not in run.started:
        enough = run.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() >= LARGE
        let_in = list(run.started)
        run.step()
        steps += 1
        assert run.started == ([*let_in, 2] if enough else let_in)
    assert steps <= 8  # the longest of those that ran


def test_in_its_turn_a_large_one_is_not_passed(engines, run):
    run.add(request(LARGE, 0), *smalls(20, seed=1), request(LARGE, 30))
    run.finish()
    assert [run.passed(i) for i in (0, 21)] == [0, 0]
    run.as_with_room(engines("llada-tiny"))


def test_two_large_ones_keep_their_order(run):
    run.add(*smalls(2), request(LARGE, 2), request(LARGE, 3), *smalls(OVERTAKES + 20, seed=4))
    run.finish()
    assert run.started.index(2) < run.started.index(3)
    assert run.passed(2) == run.passed(3) == OVERTAKES


def test_a_large_one_that_leaves_lets_all_others_in(engines, run):
    run.add(*smalls(2), request(LARGE, 2), *smalls(OVERTAKES + 20, seed=3))
    while run.scheduler.overtaken.total() < OVERTAKES:
        run.step()
    started = len(run.started)
    run.engine.abort_request(["2"])
    run.step()
    assert started < len(run.started) and not run.scheduler.overtaken
    run.finish()
    assert sorted(run.done) == [0, 1, *range(3, OVERTAKES + 23)]
    run.as_with_room(engines("llada-tiny"))


@pytest.mark.parametrize("steps_before", [2, 30])
def test_whom_a_reset_sends_back_is_in_front_again(engines, run, steps_before):
    """Before and after the large one was let in."""
    run.add(*smalls(2), request(LARGE, 2), *smalls(OVERTAKES + 20, seed=3))
    for _ in range(steps_before):
        run.step()
    inside = [number(held) for held in run.scheduler.running]
    assert (2 in inside) == (steps_before == 30)
    assert run.scheduler.reset_prefix_cache(reset_running_requests=True)
    run.step()
    assert {number(held) for held in run.scheduler.running} | set(run.done) >= set(inside)
    run.finish()
    assert run.passed(2) == OVERTAKES
    run.as_with_room(engines("llada-tiny"))


def test_nobody_starves(engines, run):
    rng = random.Random(0)
    waiting = [request(rng.choice([1, 1, 1, 1, 2, 4, 8]), seed) for seed in range(60)]
    while waiting or run.engine.has_unfinished_requests():
        while waiting and rng.random() < 0.8:
            run.add(waiting.pop())
        run.step()
    assert sorted(run.started) == list(range(60))
    passed = [run.passed(i) for i in range(60)]
    assert 0 < max(passed) <= OVERTAKES
    run.as_with_room(engines("llada-tiny"))


def test_priorities_come_before_turns(engines):
    """Whom the policy puts in front has not passed anybody."""
    run = Run(engines("llada-tiny", scheduling_policy="priority", **TIGHT))
    run.add(*smalls(2), request(LARGE, 2), priority=1)
    run.add(*smalls(OVERTAKES + 20, seed=3), priority=2)
    run.step()
    run.add(*smalls(OVERTAKES + 20, seed=100), priority=0)
    run.finish()
    less, urgent = range(3, OVERTAKES + 23), range(OVERTAKES + 23, 2 * OVERTAKES + 43)
    order = run.started.index
    assert max(map(order, urgent)) < order(2)
    assert not any(order(i) < order(2) for i in less)


def test_the_least_urgent_request_is_preempted(engines):
    """Whenever it came. Canvases that grow need more memory than there is; those that came first have the lowest
    priority."""
    config = {"dlm": {"extent": {"name": "window", "window": 8}}}
    llm = engines("llada-tiny", scheduling_policy="priority", additional_config=config, **TIGHT)
    run, preempted = Run(llm), []
    preempt = run.scheduler._preempt_request
    run.scheduler._preempt_request = lambda request, now: (preempted.append(number(request)), preempt(request, now))
    extra = {"dlm_block_length": 8, "dlm_reuse": "fast_dllm"}
    params = SamplingParams(temperature=0, max_tokens=112, ignore_eos=True, detokenize=False, extra_args=extra)
    try:
        for priority in (2, 1, 0, 0):
            run.add(({"prompt_token_ids": [7 + priority] * 9}, params), priority=priority)
        run.finish()
    finally:
        del run.scheduler._preempt_request
    assert 0 in preempted and 2 not in preempted, preempted
    assert run.done.keys() == {0, 1, 2, 3}
    order = list(run.done)
    assert order.index(2) < order.index(1) < order.index(0)
    run.as_with_room(engines("llada-tiny", additional_config=config))


def test_thresholds_fall_while_others_wait(engines):
    """Down to a floor that a request gives; alone it is decoded as without."""
    llm = engines("llada-tiny", max_num_seqs=2)
    scheduler, steps, lowered = core_of(llm).scheduler, {}, {}
    for floor in (None, 0.0):
        extra = {"dlm_block_length": 16, "dlm_threshold": 0.95}
        if floor is not None:
            extra["dlm_threshold_floor"] = floor
        params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False, extra_args=extra)
        given = [({"prompt_token_ids": [7 + index]}, params) for index in range(8)]
        scheduler.counts = StepCounts()
        together = tokens(llm, given)
        steps[floor], lowered[floor] = scheduler.counts.denoising_steps, scheduler.counts.lowered_steps
        if floor is None:
            plain = together
        else:
            assert [tokens(llm, [request])[0] for request in given] == plain and together != plain
    assert steps[0.0] < 0.7 * steps[None] and lowered[0.0] > 0 == lowered[None]
