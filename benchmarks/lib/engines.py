"""vLLM engines in this process, their steps timed one by one."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.lib import internals
from benchmarks.lib.device import Profile
from vllm_dlm.step.counts import Counts

DEFAULTS = {"skip_tokenizer_init": True, "disable_log_stats": True, "use_tqdm_on_load": False}


def start(folder: Path | str, cpu_bytes: int = 1 << 26, share: float = 0.9, **settings):
    """`cpu_bytes`: size of the KV cache on a CPU; `share`: of the memory of a GPU"""
    from vllm import LLM

    own = {"gpu_memory_utilization": share} if torch.cuda.is_available() else {"kv_cache_memory_bytes": cpu_bytes}
    return LLM(str(folder), **(DEFAULTS | own | settings))


def sampling(new: int, options: dict | None = None, streamed: bool = False, **more):
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    kind = {"output_kind": RequestOutputKind.DELTA} if streamed else {}
    given = {"temperature": 0, "max_tokens": new, "detokenize": False, "extra_args": options} | kind
    return SamplingParams(**(given | more))


def generate(llm, prompts: list[list[int]], params) -> list[list[int]]:
    """`params`: one for all, or a list. -> tokens"""
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def random_prompts(vocabulary: int, lengths: list[int], seed: int) -> list[list[int]]:
    """Ids without the last two, which are special in the shapes of models.py"""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary - 2, (length,), generator=draw).tolist() for length in lengths]


@dataclass
class Step:
    counts: Counts
    requests: int
    filled: int  # tokens
    ms: float = 0.0  # everything between two steps included
    forward_ms: float | None = None
    head_ms: float | None = None


@dataclass
class Run:
    steps: list[Step]
    seconds: float
    tokens: int  # delivered; filled, if the run was cut
    cut: bool


@dataclass
class Work:
    """Requests that are submitted together."""

    prompts: list[list[int]]
    new: int
    options: dict = field(default_factory=dict)
    steps: int | None = None  # only the first ones


class DenoisingEngine:
    def __init__(self, llm):
        self.llm, self.names, self.seen = llm, itertools.count(), []
        self.marks = internals.StepMarks()
        internals.runner_of(llm).denoiser.observers.append(self.marks)
        internals.on_steps(llm, lambda *step: self.seen.append(Step(*step)))

    def run(self, work: Work, profile: Profile | None = None) -> Run:
        engine, names = self.llm.llm_engine, []
        params = sampling(work.new, work.options, streamed=True, ignore_eos=True)
        self.llm.reset_prefix_cache()  # block-causal models would find the prompts of the last run there
        begin = time.perf_counter()
        for ids in work.prompts:
            names.append(engine.add_request(str(next(self.names)), {"prompt_token_ids": ids}, params))
        self.seen.clear()
        delivered, wanted = 0, work.new * len(names)
        while engine.has_unfinished_requests() and len(self.seen) < (work.steps or wanted + 1):
            if profile:
                profile.begin_step(len(self.seen))
            before, started = len(self.seen), time.perf_counter()
            delivered += sum(len(output.outputs[0].token_ids) for output in engine.step())
            if len(self.seen) > before:
                self.seen[-1].ms = 1000 * (time.perf_counter() - started)
                # The step has waited for its tokens: reading the clocks waits for nothing in flight.
                self.seen[-1].forward_ms, self.seen[-1].head_ms = self.marks.parts()
        seconds, cut = time.perf_counter() - begin, engine.has_unfinished_requests()
        if cut:
            engine.abort_request(names, internal=True)
        elif delivered != wanted:
            raise RuntimeError(f"{wanted} tokens were requested, {delivered} were delivered")
        return Run(list(self.seen), seconds, sum(s.filled for s in self.seen) if cut else delivered, cut)

    def repeated(self, work: Work, most: int, seconds: float) -> list[Run]:
        """After a warm-up, at most `most` repetitions, none after `seconds`."""
        self.run(work)
        runs: list[Run] = []
        while not runs or (len(runs) < most and sum(run.seconds for run in runs) < seconds):
            runs.append(self.run(work))
        return runs

    def profiled(self, work: Work) -> dict:
        """Launches and waits of steps that are partial under every policy: neither DyLLM's first four nor a refresh"""
        first, last = (8, 12) if work.steps is None else (1, max(2, work.steps))
        profile = Profile(first, last)
        self.run(Work(work.prompts, work.new, work.options, last + 1), profile)
        return profile.found()


def decode(llm, prompts: list[list[int]], new: int, profile: Profile | None = None) -> tuple[float, list[list[int]]]:
    """Autoregressive decoding of all prompts -> seconds per step, from the step in which the last request has its
    first token; tokens."""
    engine, params = llm.llm_engine, sampling(new, streamed=True, ignore_eos=True)
    tokens: dict[str, list[int]] = {f"{time.monotonic_ns()}-{i}": [] for i in range(len(prompts))}
    for name, prompt in zip(tokens, prompts, strict=True):
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    begin, done, steps = None, 0, itertools.count()
    while engine.has_unfinished_requests():
        if profile and begin is not None:
            profile.begin_step(next(steps))
        for output in engine.step():
            tokens[output.request_id] += output.outputs[0].token_ids
        if begin is None and all(tokens.values()):
            begin, done = time.perf_counter(), min(map(len, tokens.values()))
    return (time.perf_counter() - begin) / max(1, new - done), list(tokens.values())


def batches(items: list, size: int = 16) -> Iterator[list]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]
