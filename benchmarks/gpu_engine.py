"""A denoising engine in this process, its steps watched one by one."""

import itertools
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu_device import Profile, mark, milliseconds
from benchmarks.gpu_shapes import Shape
from vllm_dlm.step.counts import Counts


@dataclass
class Step:
    counts: Counts
    requests: int
    filled: int  # tokens
    ms: float = 0.0  # with the scheduler and all else between two steps
    forward_ms: float | None = None
    head_ms: float | None = None


@dataclass
class Run:
    steps: list[Step]
    seconds: float
    tokens: int  # delivered; of a run that was cut, filled
    cut: bool


class Marks:
    """An observer of steps (step/denoiser.py, which needs vLLM): where they begin, where the last layer's rows are
    there, and where tokens are."""

    def __init__(self):
        self.moments: list = []

    def step_begins(self, states) -> None:
        self.moments = [mark()]

    def step_packed(self, *packed) -> None: ...

    def head_read(self, hidden, requests) -> None:
        self.moments.append(mark())

    def step_ended(self, requests, counts) -> None:
        self.moments.append(mark())

    def parts(self) -> tuple[float | None, float | None]:
        """Milliseconds of forward and head of the last step; unknown if it did not go through all three."""
        if len(self.moments) != 3:
            return None, None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begin, between, end = self.moments
        return milliseconds(begin, between), milliseconds(between, end)


def memory() -> dict:
    """Of the device for vLLM; a CPU is for toys."""
    return {"gpu_memory_utilization": 0.9} if torch.cuda.is_available() else {"kv_cache_memory_bytes": 1 << 26}


class DenoisingEngine:
    def __init__(self, shape: Shape, rows: int, requests: int, length: int, eager: bool):
        from vllm import LLM

        self.shape, self.names, self.seen, self.marks = shape, itertools.count(), [], Marks()
        self.llm = LLM(
            str(shape.folder(Path(tempfile.mkdtemp()), max(length, 512))), load_format="dummy", dtype="bfloat16",
            max_model_len=length, max_num_seqs=requests, max_num_batched_tokens=rows, enforce_eager=eager,
            skip_tokenizer_init=True, disable_log_stats=True, use_tqdm_on_load=False, **memory(),
        )  # fmt: skip
        self.llm.collective_rpc(self.watch)

    def watch(self, worker) -> None:
        runner = worker.model_runner
        runner.denoiser.observers.append(self.marks)
        execute = runner.execute_model

        def watched(scheduler_output, *args, **kwargs):
            output = execute(scheduler_output, *args, **kwargs)
            if requests := len(scheduler_output.num_scheduled_tokens):
                if output.failed:
                    raise RuntimeError(next(iter(output.failed.values())))
                filled = sum(len(commit.filled) for commit in output.commits.values())
                self.seen.append(Step(output.counts, requests, filled))
            return output

        runner.execute_model = watched

    def run(
        self, prompt: int, new: int, requests: int, options: dict, steps: int | None, profile: Profile | None = None
    ) -> Run:
        """All requests to their ends, or the first steps of them."""
        engine, names = self.llm.llm_engine, self._add(prompt, new, requests, options)
        self.seen.clear()
        delivered, begin = 0, time.perf_counter()
        while engine.has_unfinished_requests() and len(self.seen) < (steps or new * requests + 1):
            if profile:
                profile.begin_step(len(self.seen))
            before, started = len(self.seen), time.perf_counter()
            delivered += sum(len(output.outputs[0].token_ids) for output in engine.step())
            if len(self.seen) > before:
                self.seen[-1].ms = 1000 * (time.perf_counter() - started)
                # The step has waited for its tokens: nothing is in flight that reading the clocks would wait for.
                self.seen[-1].forward_ms, self.seen[-1].head_ms = self.marks.parts()
        seconds = time.perf_counter() - begin
        cut = engine.has_unfinished_requests()
        if cut:
            engine.abort_request(names, internal=True)
        elif delivered != new * requests:
            raise RuntimeError(f"{new * requests} tokens were asked for, {delivered} came")
        return Run(list(self.seen), seconds, sum(s.filled for s in self.seen) if cut else delivered, cut)

    def profiled(self, prompt: int, new: int, requests: int, options: dict, steps: int | None) -> dict:
        """Launches and waits of steps that are partial under every policy: neither DyLLM's first four nor a refresh."""
        window = (8, 12) if steps is None else (1, max(2, steps))
        profile = Profile(*window)
        self.run(prompt, new, requests, options, window[1] + 1, profile)
        return profile.found()

    def _add(self, prompt: int, new: int, requests: int, options: dict) -> list[str]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, extra_args=options,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        draw = torch.Generator().manual_seed(prompt)
        names = []
        for _ in range(requests):
            ids = torch.randint(0, self.shape.model.vocabulary - 2, (prompt,), generator=draw).tolist()
            names.append(self.llm.llm_engine.add_request(str(next(self.names)), {"prompt_token_ids": ids}, params))
        return names
