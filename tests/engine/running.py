"""Engines in this process: their tokens, their parts, and observers of their steps."""

from collections.abc import Callable
from contextlib import contextmanager

import torch

from vllm_dlm.step.denoiser import Observer


def tokens(llm, requests) -> list[tuple[int, ...]]:
    prompts, params = zip(*requests, strict=True)
    outputs = llm.generate(list(prompts), list(params), use_tqdm=False)
    for output, asked in zip(outputs, params, strict=True):
        assert output.outputs[0].finish_reason != "error", (asked.extra_args, output.outputs[0].stop_reason)
    return [tuple(output.outputs[0].token_ids) for output in outputs]


def answers(llm, requests) -> list[tuple]:
    prompts, params = zip(*requests, strict=True)
    outputs = llm.generate(list(prompts), list(params), use_tqdm=False)
    for output, asked in zip(outputs, params, strict=True):
        assert "error" not in {sample.finish_reason for sample in output.outputs}, (asked, output.outputs)
    return [answer_of(output) for output in outputs]


def answer_of(output) -> tuple:
    """(tokens, why it ended, tokens whose log-probabilities were given), of each sample"""
    return tuple(
        (
            tuple(sample.token_ids),
            sample.finish_reason,
            sample.stop_reason,
            sample.logprobs and tuple(tuple(sorted(position)) for position in sample.logprobs),
        )
        for sample in output.outputs
    )


def stepped(llm, requests, meanwhile: Callable[[int], None]) -> dict[int, tuple]:
    """Answers of those that end, step by step; `meanwhile(step)` is called before each of them."""
    engine, done, step = llm.llm_engine, {}, 0
    for index, (prompt, params) in enumerate(requests):
        engine.add_request(str(index), prompt, params)
    while engine.has_unfinished_requests():
        meanwhile(step)
        done |= {int(output.request_id): answer_of(output) for output in engine.step() if output.finished}
        step += 1
    return done


def interrupted(llm, requests, *after: int) -> list[tuple]:
    """Answers where whoever runs after so many steps loses its caches."""
    left, scheduler = set(after), core_of(llm).scheduler

    def reset(step: int) -> None:
        if step in left:
            assert scheduler.running and scheduler.reset_prefix_cache(reset_running_requests=True)
            left.remove(step)

    done = stepped(llm, requests, reset)
    assert not left
    return [done[index] for index in range(len(requests))]


@contextmanager
def preempted(llm):
    """Requests that give up their memory to others while inside"""
    scheduler, found = core_of(llm).scheduler, []
    preempt = scheduler._preempt_request
    scheduler._preempt_request = lambda request, now: (found.append(request.request_id), preempt(request, now))
    try:
        yield found
    finally:
        del scheduler._preempt_request


def core_of(llm):
    return llm.llm_engine.engine_core.engine_core


def runner_of(llm):
    return core_of(llm).model_executor.driver_worker.worker.model_runner


def free_blocks(core) -> int:
    return core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def all_blocks_are_free(llm) -> bool:
    core = core_of(llm)
    return free_blocks(core) == core.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1  # one is vLLM's own


def poison(llm) -> None:
    """All memory is NaN and known for nothing: whoever reads what it did not write is found out."""
    assert core_of(llm).scheduler.reset_prefix_cache()
    for cache in runner_of(llm).kv_caches:
        cache.fill_(torch.nan)


class Watching(Observer):
    """Sees the steps of an engine while it is inside."""

    def __init__(self, llm):
        self.denoiser = runner_of(llm).denoiser

    def __enter__(self):
        self.denoiser.observers.append(self)
        return self

    def __exit__(self, *_):
        self.denoiser.observers.remove(self)


class Recorder(Watching):
    """Positions and logits of every candidate of every step, by request."""

    def __enter__(self):
        self.steps = {}
        return super().__enter__()

    def head_read(self, hidden, requests):
        for request in requests:
            logits = self.denoiser.model.compute_logits(hidden[request.rows])
            self.steps.setdefault(request.state.req_id, []).append((request.positions.copy(), logits.cpu().numpy()))


class Rows(Watching):
    """Live rows of each request in each step"""

    def __enter__(self):
        self.live = []
        return super().__enter__()

    def step_begins(self, states):
        self.live += [len(state.canvas.plan.live) for state in states]


class Counted(Watching):
    """What each step counted."""

    def __enter__(self):
        self.steps = []
        return super().__enter__()

    def step_ended(self, requests, counts):
        self.steps.append(counts)

    def total(self, field: str) -> int:
        return sum(getattr(counts, field) for counts in self.steps)
