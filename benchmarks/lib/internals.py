"""Everything in benchmarks/ that reads or replaces internals of the engine; nothing else here touches them.

Suites see requests, observers and counts through this module alone.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks.lib.device import mark, milliseconds
from vllm_dlm.methods import methods
from vllm_dlm.step.counts import Counts
from vllm_dlm.step.denoiser import Observer, plain_stream


def core_of(llm):
    """vLLM's engine core, in this process."""
    return llm.llm_engine.engine_core.engine_core


def worker_of(llm):
    return core_of(llm).model_executor.driver_worker.worker


def runner_of(llm):
    return worker_of(llm).model_runner


def layers_of(llm) -> int:
    return core_of(llm).scheduler.model_shape.layers


def rows_read(llm) -> int:
    """Rows of all canvases and prompts so far"""
    return core_of(llm).scheduler.counts.rows_live


def set_server_options(llm, options) -> None:
    """What new requests get that name nothing themselves."""
    for config in (llm, llm.llm_engine.input_processor, core_of(llm).scheduler.vllm_config):
        config.model_config.dlm_options = options


@contextmanager
def registered(kind: str, method) -> Iterator[None]:
    """A method of this benchmark: requests carry the names of their methods, and the engine looks them up."""
    known = methods(kind)
    added = method.name not in known
    known.setdefault(method.name, type(method))
    try:
        yield
    finally:
        if added:
            del known[method.name]


@contextmanager
def observing(llm, observer: Observer) -> Iterator[Observer]:
    observers = runner_of(llm).denoiser.observers
    observers.append(observer)
    try:
        yield observer
    finally:
        observers.remove(observer)


def on_steps(llm, seen: Callable[[Counts, int, int], None]) -> None:
    """Calls `seen(counts, requests, tokens filled)` after every denoising step. A failed request is an error."""
    runner = runner_of(llm)
    execute = runner.execute_model

    def watched(scheduler_output, *args, **kwargs):
        output = execute(scheduler_output, *args, **kwargs)
        if requests := len(scheduler_output.num_scheduled_tokens):
            if output.failed:
                raise RuntimeError(next(iter(output.failed.values())))
            seen(output.counts, requests, sum(len(commit.filled) for commit in output.commits.values()))
        return output

    runner.execute_model = watched


class StepMarks(Observer):
    """When a step begins, has its last hidden states, and has its tokens."""

    def __init__(self) -> None:
        self.moments: list = []

    def step_begins(self, states) -> None:
        self.moments = [mark()]

    def head_read(self, hidden, requests) -> None:
        self.moments.append(mark())

    def step_ended(self, requests, counts) -> None:
        self.moments.append(mark())

    def parts(self) -> tuple[float | None, float | None]:
        """Milliseconds of forward and head of the last step; None if it did not go through all three."""
        if len(self.moments) != 3:
            return None, None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begin, between, end = self.moments
        return milliseconds(begin, between), milliseconds(between, end)


class StepSums(Observer):
    """Forwards of requests, and rows through the feed-forward of a layer."""

    def __init__(self, layers: int):
        self.layers, self.forwards, self.rows = layers, 0, 0.0

    def step_ended(self, requests, counts) -> None:
        self.forwards += len(requests)
        self.rows += counts.rows["feed_forward"] / self.layers


class Drift(Observer):
    """Compares each step with the exact model over the same canvases."""

    def __init__(self, llm):
        self.denoiser = runner_of(llm).denoiser
        self.filled = self.agreed = self.rows = self.recomputed = self.dense = 0
        self.kl = 0.0
        self.got: dict[str, torch.Tensor] = {}

    def head_read(self, hidden, requests) -> None:
        self.got = {reading.state.req_id: self._logprobs(hidden[reading.rows]) for reading in requests}

    def step_ended(self, requests, counts) -> None:
        streams = [plain_stream(request.state.canvas.tokens, request.positions) for request in requests]
        exact = self._logprobs(self.denoiser.forward(streams, Counts()))
        for request, want in zip(requests, exact.split([len(r.positions) for r in requests]), strict=True):
            got = self.got[request.state.req_id]
            self.kl += (want.exp() * (want - got)).sum().item()
            self.rows += len(want)
            chosen = int(np.argmax(request.proposal.score))  # one token per step: the most confident one
            self.agreed += int(want[chosen].argmax() == request.proposal.token[chosen])
            self.filled += 1
        self.recomputed += counts.rows["feed_forward"]
        self.dense += len(self.denoiser.model.model.layers) * sum(len(r.state.canvas) for r in requests)

    def _logprobs(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.denoiser.model.compute_logits(hidden).float().log_softmax(-1)


class AttentionKept:
    """Attention weight on the prompt keys that a selection keeps: of all weight, and of the most that as many keys
    could get. `attention_mass(question)` is the weight itself."""

    def __init__(self, split: Callable, attention_mass: Callable):
        self.split, self.attention_mass = split, attention_mass
        self.kept, self.best, self.total = torch.zeros(3, dtype=torch.float64)
        self.read = self.prompt = 0

    @contextmanager
    def measured(self) -> Iterator["AttentionKept"]:
        from vllm_dlm.step.selection import GroupSelection

        visible = GroupSelection.visible

        def weighed(group, queries):
            found = visible(group, queries)
            asked = self.split(group.asked(queries))
            for keys, units, own in zip(group.keys, group.units(found), asked, strict=True):
                self._add(keys.prompt_len, keys.selection.unit, units, own)
            return found

        GroupSelection.visible = weighed
        try:
            yield self
        finally:
            GroupSelection.visible = visible

    def _add(self, prompt_len: int, unit: int, units: torch.Tensor, question) -> None:
        weight = self.attention_mass(question)[:, :prompt_len].double()
        unit_of_key = torch.arange(prompt_len) // unit
        seen = torch.stack([torch.isin(unit_of_key, own) for own in units])  # [Hkv, prompt]
        self.total += weight.sum()
        self.kept += weight[seen].sum()
        for own, mask in zip(weight, seen, strict=True):
            self.best += own.topk(int(mask.sum()))[0].sum()
        self.read, self.prompt = self.read + int(seen.sum()), self.prompt + seen.numel()


# -- page-sparse decoding ----------------------------------------------------------------------------------------------


def page_counts(llm) -> dict:
    (counts,) = llm.collective_rpc("dlm_page_counts")
    return counts


def skip_prompts(llm) -> None:
    """Long chunks do not go through the model; short ends of prompts, and decoding, do."""
    worker = worker_of(llm)
    model, config = worker.model_runner.model, worker.model_config
    forward, width = model.forward, config.get_hidden_size()

    def without_prompts(*rest, positions, **more):
        if (count := positions.shape[-1]) > 256:
            return torch.zeros(count, width, dtype=config.dtype)
        return forward(*rest, positions=positions, **more)

    model.forward = without_prompts


def fill_cache(llm) -> None:
    """Random keys and values in every page, and their summaries."""
    for layer in worker_of(llm).vllm_config.compilation_config.static_forward_context.values():
        pages = layer.kv_cache
        piece = torch.randn(8, *pages.shape[1:]).to(pages.dtype)
        for start in range(0, len(pages), len(piece)):
            pages[start : start + len(piece)] = piece[: len(pages) - start].roll(start, 1)
        if (summaries := getattr(layer.impl, "summaries", None)) is not None:
            for ids in torch.arange(len(summaries.first)).split(256):
                layer.impl.describe(pages, ids)


# -- the live view -----------------------------------------------------------------------------------------------------


@contextmanager
def view_hooks_removed(llm) -> Iterator[None]:
    """Steps as they are without the live view."""
    processor, seeing = type(llm.llm_engine.output_processor), runner_of(llm).seeing
    hooked, attach = processor.process_outputs, seeing.attach
    processor.process_outputs = hooked.__wrapped__
    seeing.attach = lambda observed, current: None
    try:
        yield
    finally:
        processor.process_outputs, seeing.attach = hooked, attach


def observe_request(name: str) -> None:
    """Registers the next request added to the engine for frames, with a reader that takes each frame at once."""
    from vllm_dlm.integration.view import ADDED
    from vllm_dlm.options.limits import Limits
    from vllm_dlm.view.hub import HUB, Follower
    from vllm_dlm.view.observed import ObservedRequest

    class Reader(Follower):
        def notify(self, at_once: bool = False) -> None:
            asyncio.run(self.take())

    options = SimpleNamespace(frames=True, watch=False, observed=True, trajectory=False)
    channel = SimpleNamespace(follower=Reader(), open=lambda choices: 0)
    request = ObservedRequest(name, "bench", 1, options, channel)
    HUB.admit(request, Limits())
    ADDED.set([request])


def forget_observed() -> None:
    from vllm_dlm.view.hub import HUB

    HUB.remove(list(HUB.admitted))


def timed_step(llm) -> float:
    """Seconds of one step of the engine, output included."""
    begin = time.perf_counter()
    llm.llm_engine.step()
    return time.perf_counter() - begin
