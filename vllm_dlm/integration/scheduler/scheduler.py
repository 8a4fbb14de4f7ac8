"""The denoising scheduler, which selects the requests of each step.

A causal request appends tokens; a diffusion request recomputes rows of a canvas
of fixed length until no mask is left. `schedule` is therefore replaced, while
queues, KV blocks, stop checks, finishing and streaming are inherited. Managers
hold the canvases (`OpenCanvases`), their memory (`CanvasMemory`), cached
prefixes (`Prefixes`), the order of refreshes (`RefreshStagger`) and of the queue
(`Overtakes`). Read in vLLM 0.32: v1/core/sched/scheduler.py.
"""

import time
from itertools import islice

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import CachedRequestData
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from vllm_dlm.cache.budget import BlockShape
from vllm_dlm.canvas.canvas import Canvas
from vllm_dlm.envelope import Envelope, with_envelope
from vllm_dlm.integration.outputs import DenoisingSchedule
from vllm_dlm.integration.scheduler.canvas_memory import CanvasMemory
from vllm_dlm.integration.scheduler.open_canvases import OpenCanvases
from vllm_dlm.integration.scheduler.overtakes import OVERTAKES, Overtakes
from vllm_dlm.integration.scheduler.prefixes import Prefixes
from vllm_dlm.integration.scheduler.stagger import RefreshStagger
from vllm_dlm.integration.scheduler.step_counting import count_delivery, count_step, count_work
from vllm_dlm.step.counts import ModelShape, StepCounts
from vllm_dlm.step.failures import Failures
from vllm_dlm.view.traces import report

logger = init_logger(f"vllm.{__name__}")

#: number of rows up to which a step takes hardly longer than with a few, available to speculative canvases
FULL = 256


class DenoisingScheduler(Scheduler):
    running: list[Request]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_shape = ModelShape.from_config(self.vllm_config.model_config.hf_config)
        self.canvases = OpenCanvases(self.vllm_config)
        self.traces = self.canvases.traces
        self.memory = CanvasMemory(self.kv_cache_manager, BlockShape.of(self.vllm_config))
        self.prefixes = Prefixes(self.kv_cache_manager, self.memory.shape.block_size)
        self.stagger = RefreshStagger()
        self.overtaken = Overtakes()
        self.more_blocks: dict[str, tuple[list[int], ...]] = {}  # new blocks of running requests in this step
        self.failed = Failures()  # requests that end with an error when this step's output arrives
        self.counts = StepCounts()

    def schedule(self, throttle_prefills: bool = False) -> DenoisingSchedule:
        self.current_step += 1
        now = time.monotonic()
        self.kv_cache_manager.new_step_starts()
        rows: dict[str, int] = {}
        new: list[Request] = []
        old: list[Request] = []
        if self._pause_state != PauseState.PAUSED_ALL:
            old, held, skipped = self._take_running(rows, now)
            # Requests that do not fit are first in line in the next step, and no new request is admitted before them.
            failing = [request for request in self.running if request.request_id in self.failed]
            self.running = skipped + held + old + failing  # without preempted requests
            if not skipped and self._pause_state == PauseState.UNPAUSED:
                new = self._admit_waiting(rows, now)
        output = DenoisingSchedule(
            scheduled_new_reqs=[self.canvases.starting(request, self._block_ids(request)) for request in new],
            scheduled_cached_reqs=CachedRequestData(
                req_ids=[request.request_id for request in old],
                resumed_req_ids=set(),
                new_token_ids=[],
                all_token_ids={},
                new_block_ids=[self.more_blocks.pop(request.request_id, None) for request in old],
                num_computed_tokens=[request.num_computed_tokens for request in old],
                num_output_tokens=[request.num_output_tokens for request in old],
            ),
            num_scheduled_tokens=rows,
            total_num_scheduled_tokens=sum(rows.values()),
            scheduled_spec_decode_tokens={},
            scheduled_encoder_inputs={},
            preempted_req_ids=self.reset_preempted_req_ids,
            finished_req_ids=self.finished_req_ids,
            free_encoder_mm_hashes=[],
            new_block_ids_to_zero=self._get_new_block_ids_to_zero(),
            canvases=self._speculative_canvases(old, rows),
            pressure=len(self.waiting) / max(len(self.waiting) + len(self.running), 1),
        )
        self._update_after_schedule(output)
        for request_id in rows:
            # The inherited code has no masks, so for it all known tokens are computed.
            request = self.requests[request_id]
            request.num_computed_tokens = request.num_tokens
            request.is_prefill_chunk = False
        return output

    # -- running requests ------------------------------------------------------------------

    def _take_running(self, rows: dict[str, int], now: float) -> tuple[list[Request], list[Request], list[Request]]:
        """-> requests that run, requests with a refresh that is held back, and requests that do not fit"""
        taken, held, skipped = [], [], []
        by_priority = sorted(self.running, key=self._priority)
        planned = [(request, canvas) for request in by_priority if (canvas := self._planned(request))]
        self.stagger.begin((request.request_id, canvas) for request, canvas in planned)
        for request, canvas in planned:
            name = request.request_id
            if request.status != RequestStatus.RUNNING:
                continue  # preempted for another request
            if self.stagger.holds_back(name, canvas):
                held.append(request)
            elif self._fits(canvas, rows) and self._grow(request, canvas, rows, now):
                rows[name] = canvas.weight
                self.stagger.ran(name, canvas)
                taken.append(request)
            else:
                skipped.append(request)
        held, skipped = (
            [request for request in part if request.status == RequestStatus.RUNNING] for part in (held, skipped)
        )
        return taken, held, skipped

    def _planned(self, request: Request) -> Canvas | None:
        """Its canvas, with the next step planned; None: the plan raised an error, so the request fails."""
        with self.failed.catch(request.request_id):
            canvas = self.canvases.open(request)
            canvas.make_plan()
            return canvas
        return None

    def _fits(self, canvas: Canvas, rows: dict[str, int]) -> bool:
        """Whether the request's next step fits into the budget. A single request always runs, although it may exceed
        the budget with guidance."""
        return not rows or sum(rows.values()) + canvas.weight <= self.max_num_scheduled_tokens

    def _grow(self, request: Request, canvas: Canvas, rows: dict[str, int], now: float) -> bool:
        """Allocates the KV blocks of the request's next step -> whether it has them. If too few are free, requests of
        the lowest priority that do not run in this step are preempted, the last one to arrive first. They restart
        their canvas block later. Requests that run in this step have no lower priority, see _take_running."""
        if not canvas.grown:
            return True
        missing = self.memory.missing(request, canvas)
        while missing > self.memory.free:
            running = (one for one in self.running if one.status == RequestStatus.RUNNING)
            idle = [one for one in running if one.request_id not in rows and one.request_id not in self.failed]
            last = max(idle, key=lambda one: (self._priority(one), one.arrival_time, one.request_id))
            self._preempt_request(last, now)
            if last is request:
                return False
        if missing > 0:
            self.more_blocks[request.request_id] = self.memory.grow(request, canvas)
        return True

    def _speculative_canvases(self, running: list[Request], rows: dict[str, int]) -> dict[str, int]:
        """-> number of streams of each request that speculates. Shares the rows that hardly prolong the step evenly."""
        drafting = {
            request.request_id: canvas
            for request in running
            if (canvas := self.canvases[request.request_id]).options.canvases > 1 and not canvas.plan.refresh
        }
        if not drafting:
            return {}
        spare = min(FULL, self.max_num_scheduled_tokens) - sum(rows.values())
        each = spare // sum(canvas.weight for canvas in drafting.values())
        return {name: min(canvas.options.canvases, 1 + each) for name, canvas in drafting.items()} if each > 0 else {}

    # -- waiting requests ------------------------------------------------------------------

    def _admit_waiting(self, rows: dict[str, int], now: float) -> list[Request]:
        admitted = []
        while len(self.running) < self.max_num_active_reqs:
            if (found := self._next_waiting()) is None:
                break
            request, canvas, shared = found
            if not self._fits(canvas, rows):
                break
            name, others_run = request.request_id, bool(self.running)
            self.memory.allocate(request, canvas, shared, others_run)
            self.prefixes.admitted(request, canvas)
            self.overtaken.admitted(name, (ahead.request_id for ahead in self.waiting))
            self.waiting.remove_request(request)
            self.running.append(request)
            if self.log_stats:
                request.record_event(EngineCoreEventType.SCHEDULED, now)
            if request.prefill_stats is not None and request.num_preemptions == 0:
                request.prefill_stats.set(
                    num_prompt_tokens=request.num_prompt_tokens,
                    num_local_cached_tokens=canvas.written,
                    num_external_cached_tokens=0,
                )
            request.status = RequestStatus.RUNNING
            rows[name] = canvas.weight
            self.stagger.ran(name, canvas)
            admitted.append(request)
        return admitted

    def _next_waiting(self) -> tuple[Request, Canvas, KVCacheBlocks] | None:
        """The first waiting request that fits into memory, with its cached prefix. It may overtake requests of the same
        priority that do not fit, unless one of them was overtaken too often."""
        first: int | None = None
        for request in islice(self.waiting, 1 + OVERTAKES):
            if (priority := self._priority(request)) > (first := priority if first is None else first):
                break
            with self.failed.catch(request.request_id):
                canvas = self.canvases.open(request)
                self.memory.check_size(canvas)
                shared = self.prefixes.find(request, canvas)
                if self.memory.fits(canvas, shared, others_run=bool(self.running)):
                    canvas.make_plan()
                    return request, canvas, shared
                if self.overtaken.exhausted(request.request_id):
                    break
        return None

    def _priority(self, request: Request) -> int:
        """A smaller number is more urgent."""
        return request.priority if self.policy == SchedulingPolicy.PRIORITY else 0

    def _block_ids(self, request: Request) -> tuple[list[int], ...]:
        return self.kv_cache_manager.get_blocks(request.request_id).get_block_ids()

    # -- after the step --------------------------------------------------------------------

    def update_from_output(self, scheduler_output: DenoisingSchedule, model_runner_output):
        ended = self._end_failed(model_runner_output)
        commits = getattr(model_runner_output, "commits", {})
        for request_id in scheduler_output.num_scheduled_tokens:
            if (canvas := self.canvases.get(request_id)) and request_id in commits:
                count_step(self.counts, canvas, scheduler_output.pressure)
                written = canvas.written
                canvas.apply(commits[request_id])
                if canvas.written > written:
                    self.prefixes.keep(self.requests[request_id], canvas)
        traces = self.canvases.traced(commits, getattr(model_runner_output, "seen", {}))
        if (work := getattr(model_runner_output, "counts", None)) is not None:
            count_work(self.counts, work, model_runner_output.caches, self.model_shape)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if traces:
            report(traces, outputs)
        for request_id, commit in commits.items():
            if canvas := self.canvases.get(request_id):  # the request continues
                canvas.hand_out(commit.left)
        for output, client in ended:
            outputs.setdefault(client, EngineCoreOutputs()).outputs.append(output)
        return outputs

    def _end_failed(self, model_runner_output) -> list[tuple[EngineCoreOutput, int]]:
        """Ends requests that failed here or in the worker -> output and client of each."""
        failed = self.failed | getattr(model_runner_output, "failed", {})
        self.failed.clear()
        for request_id in failed:
            self.prefixes.forget(request_id)
        ended = []
        for request in self.finish_requests(failed, RequestStatus.FINISHED_ERROR) if failed else []:
            why = failed[request.request_id]
            logger.error("Request %s ends with an error: %s", request.request_id, why)
            output = EngineCoreOutput(
                request.request_id,
                [],
                finish_reason=request.get_finished_reason(),
                stop_reason=why,
                events=request.take_events(),
                trace_headers=request.trace_headers,
            )
            ended.append((output, request.client_index))
        return ended

    def _update_request_with_output(self, request: Request, new_token_ids: list[int], **kwargs):
        tokens, stopped = super()._update_request_with_output(request, new_token_ids, **kwargs)
        count_delivery(self.counts, self.canvases[request.request_id], len(tokens))
        return tokens, stopped

    def _free_request_blocks(self, request: Request) -> None:
        """Called if the request is finished, aborted or preempted. A preempted request continues after its last
        finished block."""
        self.stagger.forget(request.request_id)
        if request.is_finished():
            self.canvases.close(request.request_id)
            self.overtaken.pop(request.request_id, None)
        elif canvas := self.canvases.get(request.request_id):
            canvas.rewind()
        super()._free_request_blocks(request)

    def make_stats(self, *args, **kwargs):
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            stats = with_envelope(stats, Envelope(steps=self.counts))
            self.counts = StepCounts()
        return stats
