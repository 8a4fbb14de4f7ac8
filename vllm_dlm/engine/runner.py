"""The denoising runner: one step of every scheduled request in one packed forward.

It takes the place of vLLM's model runner inside vLLM's worker and is the same
Python on every device. Read in vLLM 0.32: v1/worker/gpu_model_runner.py for
the methods a worker calls.
"""

import zlib
from contextlib import nullcontext

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model_loader
from vllm.utils.mem_utils import DeviceMemoryProfiler, format_gib
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from vllm_dlm.cache.blocks import Pages
from vllm_dlm.cache.budget import BlockShape
from vllm_dlm.engine.counts import Counts
from vllm_dlm.engine.failures import Failures
from vllm_dlm.engine.forward import Watch, denoise
from vllm_dlm.engine.head import Head, HeadRequest
from vllm_dlm.engine.outputs import make_output
from vllm_dlm.engine.packing import Stream, pack, split
from vllm_dlm.engine.request import Denoising, Sampling
from vllm_dlm.engine.selected_keys import View
from vllm_dlm.integration.registration import resolved_options
from vllm_dlm.options import request_options
from vllm_dlm.plugins.reuse.base import StepPlan
from vllm_dlm.plugins.reuse.none import Dense

logger = init_logger(f"vllm.{__name__}")  # vLLM configures loggers under its own name only


class DenoisingRunner:
    # what workers ask of a runner and diffusion models do not have
    lora_config = None
    is_pooling_model = False

    def __init__(self, vllm_config: VllmConfig, device: torch.device):
        self.vllm_config, self.device = vllm_config, device
        self.model_config = vllm_config.model_config
        self.max_rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.max_model_len = self.model_config.max_model_len
        self.options = resolved_options(vllm_config)
        self.requests: dict[str, Denoising] = {}
        self.tables: dict[str, np.ndarray] = {}  # block ids of each request, as vLLM handed them out
        self.shift = self.model_config.hf_config.logits_shift
        self.preempted: dict[str, Denoising] = {}  # where requests stood that will be started again
        self.shape = BlockShape.of(vllm_config)
        self.kv_caches: list[torch.Tensor] = []
        self.pages: Pages | None = None
        self.model_memory_usage = 0

    # -- set-up ----------------------------------------------------------------------------

    def load_model(self, load_dummy_weights: bool = False) -> None:
        if load_dummy_weights:
            self.vllm_config.load_config.load_format = "dummy"
        logger.info("Loading %s", self.model_config.model)
        with DeviceMemoryProfiler() if self.device.type == "cuda" else nullcontext() as memory:
            loader = get_model_loader(self.vllm_config.load_config)
            self.model = loader.load_model(vllm_config=self.vllm_config, model_config=self.model_config)
        if memory is not None:
            self.model_memory_usage = memory.consumed_memory
            logger.info("Model weights take %s GiB", format_gib(self.model_memory_usage))
        self.head = Head(self.model.compute_logits, self.model_config.hf_config)

    def get_kv_cache_spec(self) -> dict[str, FullAttentionSpec]:
        config = self.model_config.hf_config
        spec = FullAttentionSpec(
            block_size=self.vllm_config.cache_config.block_size,
            num_kv_heads=config.num_key_value_heads // get_tensor_model_parallel_world_size(),
            head_size=config.hidden_size // config.num_attention_heads,
            dtype=self.model_config.dtype,
            non_causal=True,
        )
        return {f"model.layers.{i}.self_attn": spec for i in range(config.num_hidden_layers)}

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, is_profiling=False, kv_cache_allocation_context=None):
        with kv_cache_allocation_context or nullcontext():
            self.kv_caches = [
                torch.empty(
                    kv_cache_config.num_blocks,
                    spec.num_kv_heads,
                    spec.block_size,
                    2 * spec.head_size,
                    dtype=spec.dtype,
                    device=self.device,
                )
                for spec in self.get_kv_cache_spec().values()
            ]  # per layer [blocks, Hkv, block_size, 2 * D], keys before values
        self.pages = Pages(self.kv_caches)

    @torch.inference_mode()
    def profile_run(self, **_) -> None:
        """The largest step there can be: every row of the budget, and a full piece of logits being sampled."""
        parts = np.array_split(np.arange(self.max_rows), -(-self.max_rows // self.max_model_len))
        # every row as a head row: then no row is dropped in the last layer
        streams = [self._blank(len(part), np.arange(len(part))) for part in parts]
        hidden = self._forward(streams, Counts())
        options = request_options(self.options, {"dlm_cfg_scale": 1.0})
        sampling = Sampling(temperature=1.0, top_p=0.9, top_k=0, seed=0, stop_ids=frozenset(), num_logprobs=0)
        count = min(len(hidden), self.head.max_rows)
        state = Denoising.start("profile", options, sampling, 0, 0, [], max(count, len(options.decoding.blocks(count))))
        part = np.arange(count)
        self.head.run(hidden, [HeadRequest(state, part, part, part)])

    warming_up_model = profile_run

    def _dummy_run(self, num_tokens: int, **_) -> None:
        """Data-parallel peers keep step with a forward nobody reads."""
        with torch.inference_mode():
            self._forward([self._blank(max(1, min(num_tokens, self.max_model_len)), np.zeros(1, np.int64))], Counts())

    @staticmethod
    def _blank(length: int, heads: np.ndarray) -> Stream:
        plan = StepPlan.dense((0, length))
        return Stream(Dense(), plan, np.zeros(length, np.int64), heads, np.zeros(0, np.int64), plan.live)

    # -- a step ----------------------------------------------------------------------------

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput, intermediate_tensors=None) -> ModelRunnerOutput:
        for request_id in scheduler_output.preempted_req_ids or ():
            if state := self.requests.pop(request_id, None):
                self.preempted[request_id] = state
        for request_id in scheduler_output.finished_req_ids:
            for kept in (self.requests, self.tables, self.preempted):
                kept.pop(request_id, None)
        counts, failed = Counts(), Failures()
        for data in scheduler_output.scheduled_new_reqs:
            with failed.of(data.req_id):
                self.requests[data.req_id] = self._start(data)
                self.tables[data.req_id] = np.array(data.block_ids[0], dtype=np.int64)
        scheduled = [request_id for request_id in scheduler_output.num_scheduled_tokens if request_id not in failed]
        if not scheduled and not failed:
            return EMPTY_MODEL_RUNNER_OUTPUT
        states, outputs = [self.requests[request_id] for request_id in scheduled], {}
        for request in self._denoise(states, counts, failed):
            state = request.state
            with failed.of(state.req_id):
                state.commit(request.positions, request.proposal, request.logprobs)
                outputs[state.req_id] = state.take_output()
        return make_output(outputs, counts, failed)

    def _start(self, data: NewRequestData) -> Denoising:
        params = data.sampling_params
        prompt_len = len(data.prompt_token_ids)
        stop_ids = set(params.stop_token_ids or [])
        if params.eos_token_id is not None:
            stop_ids.add(params.eos_token_id)
        options = request_options(self.options, params.extra_args)
        top_p, top_k = options.decoding.filters(params.top_p, max(params.top_k, 0))
        sampling = Sampling(
            temperature=params.temperature,
            top_p=top_p,
            top_k=top_k,
            seed=own_seed(data.req_id, self.model_config.seed) if params.seed is None else params.seed,
            stop_ids=frozenset(stop_ids),
            num_logprobs=params.logprobs,
        )
        return Denoising.start(
            data.req_id,
            options,
            sampling,
            self.model_config.hf_config.mask_token_id,
            prompt_len,
            data.prefill_token_ids,
            min(prompt_len + params.max_tokens, self.max_model_len),
            self.shift,
            self.preempted.pop(data.req_id, None),
        )

    def _denoise(self, states: list[Denoising], counts: Counts, failed: Failures) -> list[HeadRequest]:
        """One forward of all requests -> what is proposed for those that have not failed"""
        streams = []
        for state in states:
            with failed.of(state.req_id):
                streams += self._streams(state)
        if not streams:
            return []
        requests = [request for _, request, guides in streams if not guides]
        with failed.of(*(request.state.req_id for request in requests), in_forward=True):
            # Canvases treated alike stand together, so that they share a group of rows.
            streams.sort(key=lambda stream: repr(stream[0].kind))
            hidden = self._forward([stream for stream, *_ in streams], counts)
            start = 0
            for stream, request, guides in streams:
                rows = np.arange(start, start := start + len(stream.head_positions))
                # several positions may be read at one row: Dream's position 0 and 1
                rows = rows[np.searchsorted(stream.head_positions, self._head_positions(request.positions))]
                request.guide_rows, request.rows = (rows, request.rows) if guides else (request.guide_rows, rows)
            self.head.run(hidden, requests)
            for request in requests:
                if not request.finite:
                    own = [stream for stream, other, _ in streams if other is request]
                    failed[request.state.req_id] = self._not_finite(own, request, hidden)
        return [request for request in requests if request.state.req_id not in failed]

    def _not_finite(self, streams: list[Stream], request: HeadRequest, hidden: torch.Tensor) -> str:
        """Where the numbers of a request stopped being finite: its step once more, watched. (It ends now, so it
        does not matter what that writes to its caches.)"""
        rows = np.concatenate([request.rows, request.guide_rows if len(streams) > 1 else request.rows[:0]])
        places = []
        if not hidden[torch.from_numpy(rows).to(hidden.device)].isfinite().all():
            self._forward(streams, Counts(), lambda place, x: places.append(place) if not x.isfinite().all() else None)
            places.append("a layer")
        return (
            f"NaN or infinite logits; the first numbers that are not finite come from {[*places, 'the output head'][0]}"
        )

    def _head_positions(self, positions: np.ndarray) -> np.ndarray:
        # Dream's logits at i predict i + 1; position 0 falls back on its own row.
        return np.maximum(positions - self.shift, 0)

    def _streams(self, state: Denoising) -> list[tuple[Stream, HeadRequest, bool]]:
        """The request's canvas and, with guidance, its twin: two caches that never meet."""
        at, reuse = state.progress(), state.options.reuse
        plan = reuse.plan(at)
        positions = reuse.candidates(state.candidates(), at)
        heads = self._head_positions(positions)
        seen = (heads >= plan.live[0]) & (heads < plan.live[1])
        positions = positions[seen]
        request = HeadRequest(state, positions, rows=None, guide_rows=None)
        kv_blocks, feature_blocks, summary_blocks = self.shape.blocks(state.options, at.prompt_len, at.length)
        table, each = self.tables[state.req_id], kv_blocks + feature_blocks + summary_blocks
        caches = state.options.caches
        streams = []
        for twin in range(state.streams):
            own = table[twin * each : (twin + 1) * each] if caches else table
            kv_table, feature_table, summary_table = np.split(own, [kv_blocks, kv_blocks + feature_blocks])
            if twin not in state.views:
                state.views[twin] = self._view(state, kv_table, summary_table)
            view = state.views[twin]
            filtered = view is not None and not reuse.caches and not at.cold
            chooses = view is not None and (filtered or not plan.whole(at.length)) and view.step_begins()
            stream = Stream(
                reuse,
                plan,
                state.unconditional() if twin else state.canvas,
                np.unique(heads[seen]),
                state.changed,
                at.response,
                reuse.feature_rows(at.prompt_len, at.length),
                kv_table if caches else None,
                feature_table,
                view,
                filtered,
                chooses,
            )
            streams.append((stream, request, bool(twin)))
        return streams

    def _view(self, state: Denoising, kv_table: np.ndarray, summary_table: np.ndarray) -> View | None:
        selection = state.options.selection
        if not selection.applies(state.prompt_len, len(state)):
            return None
        tables = (torch.from_numpy(table).to(self.device) for table in (kv_table, summary_table))
        # What delta_v adds to cached contexts holds only as long as they are of the same keys.
        frozen = state.options.reuse.attention == "delta_v"
        return View(selection, state.prompt_len, len(state), self.shape.block_size, *tables, frozen)

    def _forward(self, streams: list[Stream], counts: Counts, watch: Watch | None = None) -> torch.Tensor:
        def features_per_block(reuse):
            return self.shape.features_per_block(reuse.features)

        hidden = []
        for part in split(streams, self.max_rows):
            packed = pack(part, self.device, self.shape.block_size, features_per_block)
            hidden.append(denoise(self.model, packed, self.pages, counts, watch))
        return torch.cat(hidden) if len(hidden) > 1 else hidden[0]

    # -- the rest of a runner's interface --------------------------------------------------

    def get_model(self) -> torch.nn.Module:
        return self.model

    def get_draft_model(self) -> None:
        return None

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def take_draft_token_ids(self) -> None:
        return None

    def update_max_model_len(self, max_model_len: int) -> None:
        self.max_model_len = max_model_len

    def reset_mm_cache(self) -> None: ...

    def reset_encoder_cache(self) -> None: ...

    def profile_cudagraph_memory(self) -> int:
        return 0

    def shutdown(self) -> None:
        self.requests.clear()


def own_seed(request_id: str, server_seed: int) -> int:
    """Of a request without one: its (random) name makes it, so that all tensor-parallel ranks agree."""
    return (zlib.crc32(request_id.encode()) + server_seed) % (1 << 63)
