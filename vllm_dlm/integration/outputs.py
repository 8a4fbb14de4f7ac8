"""Messages between scheduler and worker with fields that vLLM's lack: the canvas of a request that starts, then the
commit of each step.

Read in vLLM 0.32: v1/core/sched/output.py, v1/outputs.py.
"""

from dataclasses import dataclass, field

import numpy as np
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

from vllm_dlm.canvas.canvas import Canvas, Commit
from vllm_dlm.client_cache import ENGINE, CacheUsage, usage
from vllm_dlm.step.counts import Counts
from vllm_dlm.step.failures import Failures
from vllm_dlm.view.seen import StepRecord


@dataclass
class CanvasData(NewRequestData):
    """Data of a request that starts or resumes, with its canvas."""

    canvas: Canvas | None = None


@dataclass
class DenoisingSchedule(SchedulerOutput):
    """vLLM's schedule of a step plus the fields it lacks"""

    pressure: float = 0.0  # share of all requests that are waiting
    canvases: dict[str, int] = field(default_factory=dict)  # number of streams of each request that speculates


@dataclass
class DenoisingOutput(ModelRunnerOutput):
    """ModelRunnerOutput plus the fields it lacks."""

    commits: dict[str, Commit] = field(default_factory=dict)
    counts: Counts | None = None
    failed: dict[str, str] = field(default_factory=dict)  # error message of each request that failed
    seen: dict[str, StepRecord] = field(default_factory=dict)  # records of observed requests
    caches: dict[str, CacheUsage] = field(default_factory=dict)  # bounded caches of this worker


def make_output(
    outputs: dict[str, tuple[list[int], list]],
    commits: dict[str, Commit],
    counts: Counts,
    failed: Failures,
    seen: dict[str, StepRecord],
) -> DenoisingOutput:
    """`outputs`: tokens and log-probabilities of each request, see Denoising.take_output"""
    return DenoisingOutput(
        req_ids=list(outputs),
        req_id_to_index={req_id: index for index, req_id in enumerate(outputs)},
        sampled_token_ids=[tokens for tokens, _ in outputs.values()],
        logprobs=logprobs_lists(list(outputs.values())),
        commits=commits,
        counts=counts,
        failed=dict(failed),
        seen=seen,
        caches=usage(ENGINE),
    )


def logprobs_lists(outputs: list[tuple[list[int], list]]) -> LogprobsLists | None:
    """Log-probabilities of all output tokens of this step in vLLM's rectangular format. Rows of requests without
    log-probabilities are blank."""
    width = 1 + max((len(own.token_ids) - 1 for _, records in outputs for own in records if own), default=-1)
    if width == 0:
        return None
    counts = [len(tokens) for tokens, _ in outputs]
    token_ids = np.zeros((sum(counts), width), dtype=np.int32)
    values = np.full((sum(counts), width), -np.inf, dtype=np.float32)
    ranks = np.zeros(sum(counts), dtype=np.int32)
    for row, record in enumerate(record for _, records in outputs for record in records):
        if record is not None:
            size = len(record.token_ids)
            token_ids[row, :size], values[row, :size], ranks[row] = record
    return LogprobsLists(token_ids, values, ranks, np.cumsum([0, *counts]).tolist())
