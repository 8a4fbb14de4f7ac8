"""The denoising scheduler: whose step runs now.

A causal request advances a frontier; a diffusion request recomputes rows of a
canvas of fixed length until nothing in it is masked. So `schedule()` is
written anew and everything else (queues, KV blocks, stop checks, finishing,
streaming) is inherited. Read in vLLM 0.32: v1/core/sched/scheduler.py.
"""

import time
from collections import Counter
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
from vllm_dlm.canvas.canvas import Canvas, Commit
from vllm_dlm.engine.outputs import CanvasData, DenoisingSchedule
from vllm_dlm.engine.prefixes import Prefixes
from vllm_dlm.given import Layout
from vllm_dlm.integration.registration import resolved_options
from vllm_dlm.metrics import StepCounts
from vllm_dlm.options import request_options
from vllm_dlm.step.counts import ModelShape
from vllm_dlm.step.failures import Failures
from vllm_dlm.view.traces import Trace, report

logger = init_logger(f"vllm.{__name__}")

#: so many later requests may pass one that waits for memory; then everybody waits with it
OVERTAKES = 32
#: rows of a step up to which it takes hardly longer than with a few: those that drafts may have
FULL = 256
#: of its own steps a request waits at most this part for refreshes of others
HELD_BACK = 0.1


class DenoisingScheduler(Scheduler):
    running: list[Request]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.dlm_options = resolved_options(self.vllm_config)
        self.shape = BlockShape.of(self.vllm_config)
        self.model_shape = ModelShape.from_config(self.vllm_config.model_config.hf_config)
        self.canvases: dict[str, Canvas] = {}
        self.overtaken: Counter[str] = Counter()  # how often a waiting request was passed
        self.refreshed: Counter[str] = Counter()  # how many of a running request's steps were refreshes
        self.held: Counter[str] = Counter()  # how often one was held back
        self.counts = StepCounts()
        self.more_blocks: dict[str, tuple[list[int], ...]] = {}  # that running requests were given in this step
        self.traces: dict[str, Trace] = {}  # of requests that tell of their steps
        self.failed = Failures()  # requests that end with an error when this step's output comes back
        # A guided request has two canvases and policies keep features: more blocks than its tokens fill.
        self.kv_cache_manager.max_model_len = 1 << 40
        self.prefixes = Prefixes(self.kv_cache_manager, self.shape.block_size)

    def schedule(self, throttle_prefills: bool = False) -> DenoisingSchedule:
        self.current_step += 1
        now = time.monotonic()
        self.kv_cache_manager.new_step_starts()
        rows: dict[str, int] = {}
        new: list[Request] = []
        old: list[Request] = []
        if self._pause_state != PauseState.PAUSED_ALL:
            old, held, skipped = self._take_running(rows, now)
            # Whoever had no room is first in line next time, and nobody new is let in before.
            failing = [request for request in self.running if request.request_id in self.failed]
            self.running = skipped + held + old + failing  # without those that gave up their blocks
            if not skipped and self._pause_state == PauseState.UNPAUSED:
                new = self._admit_waiting(rows, now)
        output = DenoisingSchedule(
            scheduled_new_reqs=[self._canvas_data(request) for request in new],
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
            canvases=self._canvases_of(old, rows),
            pressure=len(self.waiting) / max(len(self.waiting) + len(self.running), 1),
        )
        self._update_after_schedule(output)
        for request_id in rows:
            # To the inherited code the whole known text is computed; masks are none of its business.
            request = self.requests[request_id]
            request.num_computed_tokens = request.num_tokens
            request.is_prefill_chunk = False
        return output

    # -- who runs --------------------------------------------------------------------------

    def _planned(self, request: Request) -> Canvas | None:
        """Its canvas, the next step planned; None: its policy raised an error, and it fails."""
        with self.failed.catch(request.request_id):
            canvas = self._canvas(request)
            canvas.plan  # noqa: B018 - is made now and kept, or fails the request now
            return canvas
        return None

    def _fits(self, canvas: Canvas, rows: dict[str, int]) -> bool:
        """Whether there is room for a request's next step in this one."""
        # alone, a request always runs: with guidance it may exceed the budget
        return not rows or sum(rows.values()) + canvas.weight <= self.max_num_scheduled_tokens

    def _take_running(self, rows: dict[str, int], now: float) -> tuple[list[Request], list[Request], list[Request]]:
        """-> who runs, whose refresh is held back, and who found no room.

        Refreshes are dear and come at intervals: they are spread over the steps as evenly as that can be had for
        HELD_BACK of a request's steps, unless its policy says otherwise. In which step of the engine a step of a
        request runs changes nothing about its result."""
        taken, held, skipped = [], [], []
        by_priority = sorted(self.running, key=self._priority)
        planned = [(request, canvas) for request in by_priority if (canvas := self._planned(request))]
        steps = sum(canvas.step for _, canvas in planned)
        made = sum(self.refreshed[request.request_id] for request, _ in planned)
        # as many as keep up with those that fall due
        at_once = -(-len(planned) * made // steps) if steps else len(planned)
        for request, canvas in planned:
            name, refresh = request.request_id, canvas.plan.refresh
            if request.status != RequestStatus.RUNNING:
                continue  # it gave up its blocks
            if refresh and at_once <= 0 and canvas.options.reuse.stagger and self._may_wait(name, canvas):
                self.held[name] += 1
                held.append(request)
            elif self._fits(canvas, rows) and self._grow(request, canvas, rows, now):
                rows[name] = canvas.weight
                self.refreshed[name] += refresh
                at_once -= refresh
                taken.append(request)
            else:
                skipped.append(request)
        held, skipped = (
            [request for request in part if request.status == RequestStatus.RUNNING] for part in (held, skipped)
        )
        return taken, held, skipped

    def _grow(self, request: Request, canvas: Canvas, rows: dict[str, int], now: float) -> bool:
        """Whether the request has the KV blocks of its next step. If too few are free, the requests of the lowest
        priority that do not run in this step are preempted, the last one to arrive first. They restart their canvas
        block later. None that runs in this step has a lower priority, see _take_running."""
        if not canvas.grown:
            return True
        manager, name = self.kv_cache_manager, request.request_id
        needed = self._blocks(canvas)
        missing = needed - len(manager.get_block_ids(name)[0])
        while missing > manager.block_pool.get_num_free_blocks():
            running = (one for one in self.running if one.status == RequestStatus.RUNNING)
            idle = [one for one in running if one.request_id not in rows and one.request_id not in self.failed]
            last = max(idle, key=lambda one: (self._priority(one), one.arrival_time, one.request_id))
            self._preempt_request(last, now)
            if last is request:
                return False
        if missing > 0:
            tokens = needed * self.shape.block_size - request.num_computed_tokens
            blocks = manager.allocate_slots(request, tokens, delay_cache_blocks=True)
            assert blocks is not None, "free blocks were counted before"
            self.more_blocks[name] = blocks.get_block_ids()
        return True

    def _canvases_of(self, running: list[Request], rows: dict[str, int]) -> dict[str, int]:
        """Rows that are left in a step which takes hardly longer with them go to drafts, the same number to each."""
        drafting = [
            (request.request_id, canvas) for request in running
            if (canvas := self.canvases[request.request_id]).options.canvases > 1 and not canvas.plan.refresh
        ]  # fmt: skip
        if not drafting:
            return {}
        spare = min(FULL, self.max_num_scheduled_tokens) - sum(rows.values())
        each = spare // sum(canvas.weight for _, canvas in drafting)
        return {name: min(canvas.options.canvases, 1 + each) for name, canvas in drafting} if each > 0 else {}

    def _may_wait(self, name: str, canvas: Canvas) -> bool:
        return self.held[name] < int(HELD_BACK * canvas.step)

    def _admit_waiting(self, rows: dict[str, int], now: float) -> list[Request]:
        admitted = []
        while len(self.running) < self.max_num_active_reqs:
            if (found := self._next_waiting()) is None:
                break
            request, canvas, shared = found
            if not self._fits(canvas, rows):
                break
            self._allocate(request, canvas, shared)
            self.prefixes.admitted(request, canvas)
            self._leave_queue(request)
            self.running.append(request)
            if self.log_stats:
                request.record_event(EngineCoreEventType.SCHEDULED, now)
            if request.prefill_stats is not None and request.num_preemptions == 0:
                request.prefill_stats.set(
                    num_prompt_tokens=request.num_prompt_tokens, num_local_cached_tokens=canvas.written,
                    num_external_cached_tokens=0,
                )  # fmt: skip
            request.status = RequestStatus.RUNNING
            rows[request.request_id] = canvas.weight
            self.refreshed[request.request_id] += canvas.plan.refresh
            admitted.append(request)
        return admitted

    def _next_waiting(self) -> tuple[Request, Canvas, KVCacheBlocks] | None:
        """The first waiting request with its cached prefix. If there is no memory for it, the first one of the same
        priority for which there is.

        A request is overtaken at most OVERTAKES times. From then on free memory is kept for it, so that it runs when
        the running requests have ended at the latest.
        """
        first: int | None = None
        for request in islice(self.waiting, 1 + OVERTAKES):
            if (priority := self._priority(request)) > (first := priority if first is None else first):
                break
            with self.failed.catch(request.request_id):
                canvas = self._canvas(request)
                self._check_size(canvas)
                shared = self.prefixes.find(request, canvas)
                if self._has_memory(canvas, shared) and canvas.plan:
                    return request, canvas, shared
                if self.overtaken[request.request_id] >= OVERTAKES:
                    break
        return None

    def _priority(self, request: Request) -> int:
        """A smaller number is more urgent."""
        return request.priority if self.policy == SchedulingPolicy.PRIORITY else 0

    def _leave_queue(self, request: Request) -> None:
        for ahead in self.waiting:
            if ahead is request:
                break
            self.overtaken[ahead.request_id] += 1
        self.waiting.remove_request(request)
        self.overtaken.pop(request.request_id, None)

    def _blocks(self, canvas: Canvas, rows: int | None = None) -> int:
        """Of all rows that the canvas has by now, or will have"""
        rows = canvas.rows if rows is None else rows
        return self.shape.tokens(canvas.options, canvas.prompt_len, len(canvas), rows) // self.shape.block_size

    def _check_size(self, canvas: Canvas) -> None:
        """The front-end refuses what cannot fit, but of unequal replicas it knows the average only."""
        needed, there = self._blocks(canvas, len(canvas)), self.kv_cache_manager.block_pool.num_gpu_blocks - 1
        if needed > there:
            raise MemoryError(f"the canvas takes {needed} blocks of the KV cache, and this replica has {there}")

    def _has_memory(self, canvas: Canvas, shared: KVCacheBlocks) -> bool:
        manager = self.kv_cache_manager
        kept_free = manager.watermark_blocks if self.running else 0
        # Blocks that the prefix cache has and nobody holds are among the free ones.
        held = sum(block.ref_cnt > 0 for group in shared.blocks for block in group)
        return self._blocks(canvas) - held + kept_free <= manager.block_pool.get_num_free_blocks()

    def _allocate(self, request: Request, canvas: Canvas, shared: KVCacheBlocks) -> None:
        tokens = self._blocks(canvas) * self.shape.block_size
        blocks = self.kv_cache_manager.allocate_slots(
            request, tokens - canvas.written, canvas.written, shared, delay_cache_blocks=True,
            has_scheduled_reqs=bool(self.running),
        )  # fmt: skip
        assert blocks is not None, "free blocks were counted before"

    def _canvas(self, request: Request) -> Canvas:
        if canvas := self.canvases.get(request.request_id):
            return canvas
        options = request_options(self.dlm_options, request.sampling_params.extra_args)
        config = self.vllm_config.model_config.hf_config
        layout = Layout.of(request.sampling_params.extra_args)
        length = options.canvas_length(request.num_prompt_tokens, request.max_tokens, self.max_model_len)
        if layout.holes:  # the end of the answer is none of its positions
            length = request.num_prompt_tokens + len(layout.start)
        canvas = Canvas(options, config.mask_token_id, config.logits_shift, request.prompt_token_ids, length, layout)
        self.canvases[request.request_id] = canvas
        if options.observed or options.trajectory:
            trace = self.traces[request.request_id] = Trace(request.request_id, request.client_index)
            trace.begins(canvas, self.model_shape.layers, bool(request.sampling_params.stop))
        return canvas

    def _canvas_data(self, request: Request) -> CanvasData:
        blocks = self.kv_cache_manager.get_blocks(request.request_id)
        data = CanvasData.from_request(request, blocks.get_block_ids())
        data.canvas = self.canvases[request.request_id]
        return data

    # -- what came back --------------------------------------------------------------------

    def update_from_output(self, scheduler_output: DenoisingSchedule, model_runner_output):
        ended = self._end_failed(model_runner_output)
        commits = getattr(model_runner_output, "commits", {})
        for request_id in scheduler_output.num_scheduled_tokens:
            if (canvas := self.canvases.get(request_id)) and request_id in commits:
                self._count(canvas)
                floor = canvas.options.decoding.threshold_floor
                self.counts.lowered_steps += floor is not None and scheduler_output.pressure > 0
                written = canvas.written
                canvas.apply(commits[request_id])
                if canvas.written > written:
                    self.prefixes.keep(self.requests[request_id], canvas)
        traces = self._traced(commits, model_runner_output) if self.traces else []
        if (counts := getattr(model_runner_output, "counts", None)) is not None:
            self.counts.rows_recomputed += counts.rows["feed_forward"] // self.model_shape.layers
            self.counts.kv_bytes_read += self.model_shape.kv_bytes(counts.keys_read)
            self.counts.kv_bytes_dense += self.model_shape.kv_bytes(counts.keys_dense)
            self.counts.caches = model_runner_output.caches
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if traces:
            report(traces, outputs)
        for request_id, commit in commits.items():
            if canvas := self.canvases.get(request_id):  # it goes on
                canvas.hand_out(commit.left)
        for request, why in ended:
            end = EngineCoreOutput(
                request.request_id, [], finish_reason=request.get_finished_reason(), stop_reason=why,
                events=request.take_events(), trace_headers=request.trace_headers,
            )  # fmt: skip
            if request.client_index not in outputs:
                outputs[request.client_index] = EngineCoreOutputs()
            outputs[request.client_index].outputs.append(end)
        return outputs

    def _traced(self, commits: dict[str, Commit], model_runner_output) -> list[Trace]:
        """Traces with something to report. They look at canvases before requests can end, and report afterwards."""
        seen = getattr(model_runner_output, "seen", {})
        found = [(name, trace) for name, trace in self.traces.items() if name in commits and name in self.canvases]
        for name, trace in found:
            trace.stepped(self.canvases[name], commits[name], seen.get(name), len(commits))
        return [trace for _, trace in found]

    def _count(self, canvas: Canvas) -> None:
        """A step of it has been made."""
        self.counts.denoising_steps += 1
        self.counts.canvas_positions += canvas.block_width
        self.counts.rows_live += canvas.streams * len(canvas.plan.live)
        self.counts.rows_dense += canvas.streams * canvas.rows
        self.counts.refresh_steps += canvas.plan.refresh or canvas.plan.whole(canvas.rows)

    def _end_failed(self, model_runner_output) -> list[tuple[Request, str]]:
        """Requests that cannot go on, here or in the worker: their clients are told, everybody else's go on."""
        failed = self.failed | getattr(model_runner_output, "failed", {})
        self.failed.clear()
        for request_id in failed:
            self.prefixes.forget(request_id)
        ended = self.finish_requests(failed, RequestStatus.FINISHED_ERROR) if failed else []
        for request in ended:
            logger.error("Request %s ends with an error: %s", request.request_id, failed[request.request_id])
        return [(request, failed[request.request_id]) for request in ended]

    def _update_request_with_output(self, request: Request, new_token_ids: list[int], **kwargs):
        tokens, stopped = super()._update_request_with_output(request, new_token_ids, **kwargs)
        canvas = self.canvases[request.request_id]
        # vLLM counts the pass that commits a block as a step of that block, and its benchmark takes
        # those passes off again.
        self.counts.denoising_steps += 1
        self.counts.canvas_positions += canvas.block_width
        self.counts.committed_tokens += len(tokens)
        return tokens, stopped

    def _free_request_blocks(self, request: Request) -> None:
        # finished, aborted or preempted; a preempted request goes on from where its last block ended
        self.refreshed.pop(request.request_id, None)
        self.held.pop(request.request_id, None)
        if request.is_finished():
            self.canvases.pop(request.request_id, None)
            self.traces.pop(request.request_id, None)
            self.overtaken.pop(request.request_id, None)
        elif canvas := self.canvases.get(request.request_id):
            canvas.rewind()
        super()._free_request_blocks(request)

    def make_stats(self, *args, **kwargs):
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            stats.spec_decoding_stats = self.counts.pack()
            self.counts = StepCounts()
        return stats
