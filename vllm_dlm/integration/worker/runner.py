"""The denoising runner, which a vLLM worker calls instead of vLLM's own model runner.

It keeps the requests and turns scheduled steps into outputs. The step itself is
in step/denoiser.py. Read in vLLM 0.32: v1/worker/gpu_model_runner.py for the
methods a worker calls, forward_context.py, v1/worker/workspace.py.
"""

import zlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model_loader
from vllm.utils.mem_utils import DeviceMemoryProfiler, format_gib
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.worker.workspace import is_workspace_manager_initialized, lock_workspace

from vllm_dlm.cache.blocks import KVBlocks, zeros
from vllm_dlm.cache.budget import BlockShape
from vllm_dlm.canvas.canvas import Canvas
from vllm_dlm.canvas.denoising import Denoising
from vllm_dlm.canvas.stream import Reading, Sampling, plain_stream
from vllm_dlm.configuration import server_options_of
from vllm_dlm.families import record_of
from vllm_dlm.integration.outputs import CanvasData, make_output
from vllm_dlm.integration.worker.warm_up import warm_up
from vllm_dlm.kernels.packed_attention import layout_for
from vllm_dlm.models.feed_forward import has_experts
from vllm_dlm.models.quantization import refuse_unsupported
from vllm_dlm.options import request_options
from vllm_dlm.step.attention import installed
from vllm_dlm.step.buckets import Costs
from vllm_dlm.step.captured import CapturedSteps
from vllm_dlm.step.counts import Counts
from vllm_dlm.step.cuda_graphs import CudaGraphs, device_works
from vllm_dlm.step.denoiser import NO_SPECULATION, Denoiser, denoise_live
from vllm_dlm.step.failures import Failures
from vllm_dlm.step.head import Head, max_logits
from vllm_dlm.view.steps import StepRecorder

logger = init_logger(f"vllm.{__name__}")  # vLLM configures loggers under its own name only


class DenoisingRunner:
    # attributes that workers read and that diffusion models do not use
    lora_config = None
    is_pooling_model = False

    def __init__(self, vllm_config: VllmConfig, device: torch.device):
        self.vllm_config, self.device = vllm_config, device
        self.model_config = vllm_config.model_config
        self.max_rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.max_model_len = self.model_config.max_model_len
        self.requests: dict[str, Denoising] = {}
        self.tables: dict[str, np.ndarray] = {}  # block ids of each request, in vLLM's order
        self.observed: set[str] = set()  # requests with reported steps
        self.kv_caches: list[torch.Tensor] = []
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
        refuse_unsupported(self.model, self.model_config.architecture)
        if self.device.type != "cpu":
            self.model.join_projections()
        head = Head(self.model.compute_logits, self.model_config.hf_config, max_logits(self.device))
        shape = BlockShape.of(self.vllm_config)
        self.denoiser = Denoiser(self.model, head, shape, self.max_rows, self.device, self.forwards)
        self.seeing = StepRecorder(self.denoiser)

    def forwards(self) -> AbstractContextManager:
        """Context of forwards, which vLLM's expert layers require."""
        alone = not has_experts(self.model_config.hf_config)
        return nullcontext() if alone else set_forward_context(None, self.vllm_config)

    def get_kv_cache_spec(self) -> dict[str, FullAttentionSpec]:
        config = self.model_config.hf_config
        spec = FullAttentionSpec(
            block_size=self.vllm_config.cache_config.block_size,
            num_kv_heads=config.num_key_value_heads // get_tensor_model_parallel_world_size(),
            head_size=config.head_dim,
            dtype=self.model_config.dtype,
            # keys of a prompt depend on later tokens, so vLLM must not cache prefixes
            non_causal=record_of(self.model_config).attention == "full",
        )
        return {f"model.layers.{i}.self_attn": spec for i in range(config.num_hidden_layers)}

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, is_profiling=False, kv_cache_allocation_context=None):
        with kv_cache_allocation_context or nullcontext():
            self.kv_caches = [
                zeros(
                    (kv_cache_config.num_blocks, spec.num_kv_heads, spec.block_size, 2 * spec.head_size),
                    spec.dtype,
                    self.device,
                )
                for spec in self.get_kv_cache_spec().values()
            ]  # per layer [blocks, Hkv, block_size, 2 * D], keys before values
        config, size = self.model_config.hf_config, self.vllm_config.cache_config.block_size
        layout = layout_for(self.device, self.model_config.dtype, size, config.head_dim)
        self.denoiser.blocks = KVBlocks(self.kv_caches, layout)

    @torch.inference_mode()
    def profile_run(self, **_) -> None:
        """Runs the largest possible step: all rows of the budget, and sampling of a full piece of logits."""
        parts = np.array_split(np.arange(self.max_rows), -(-self.max_rows // self.max_model_len))
        # all rows are head rows, so that the last layer drops none
        streams = [plain_stream(np.zeros(len(part), np.int64), np.arange(len(part))) for part in parts]
        hidden = self.denoiser.forward(streams, Counts())
        options = request_options(server_options_of(self.model_config), {"dlm_cfg_scale": 1.0})
        sampling = Sampling(temperature=1.0, top_p=0.9, top_k=0, seed=0, stop_ids=frozenset(), num_logprobs=0)
        count = min(len(hidden), self.denoiser.head.max_rows)
        canvas = Canvas(options, 0, 0, [], options.canvas_length(0, count, 2 * self.max_rows))
        part = np.arange(count)
        self.denoiser.head.run(hidden, [Reading(Denoising("profile", canvas, sampling), part, part, part)])

    warming_up_model = profile_run

    @property
    def captures(self) -> bool:
        """Whether steps are captured as CUDA graphs. This requires FlashAttention, which reads lengths on the device,
        and a single rank, because several would have to capture together."""
        model = self.model_config
        half = model.dtype in (torch.float16, torch.bfloat16)
        alone = get_tensor_model_parallel_world_size() == 1
        return self.device.type == "cuda" and not model.enforce_eager and half and installed() and alone

    @property
    def captured_costs(self) -> Costs:
        config = self.model_config.hf_config
        return Costs(
            config.num_hidden_layers, config.hidden_size, config.intermediate_size, self.model_config.dtype.itemsize
        )

    def captured_memory(self) -> int:
        """Bytes that are reserved for captured steps"""
        return self.captured_costs.room(self.max_model_len) if self.captures else 0

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compiles kernels, and captures steps unless `enforce_eager` is set."""
        config, denoiser = self.model_config.hf_config, self.denoiser
        if self.captures:
            costs, longest = self.captured_costs, self.max_model_len
            denoiser.captured = CapturedSteps(
                lambda batch, counts: denoise_live(self.model, batch, denoiser.blocks, counts),
                CudaGraphs(self.device),
                denoiser.shape,
                self.device,
                longest,
                self.max_rows,
                costs.room(longest),
                costs,
                device_works,
            )
        most = self.vllm_config.scheduler_config.max_num_seqs
        warm_up(self.denoiser, server_options_of(self.model_config), config, self.max_model_len, most)
        if self.captures and is_workspace_manager_initialized():
            # Graphs contain the address of the experts' workspace. `profile_run` had the maximum number of rows.
            lock_workspace()

    def _dummy_run(self, num_tokens: int, **_) -> None:
        """Runs a forward without using its output, to keep data-parallel ranks in step"""
        length = max(1, min(num_tokens, self.max_model_len))
        with torch.inference_mode():
            self.denoiser.forward([plain_stream(np.zeros(length, np.int64), np.zeros(1, np.int64))], Counts())

    # -- a step ----------------------------------------------------------------------------

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput, intermediate_tensors=None) -> ModelRunnerOutput:
        for request_id in (scheduler_output.preempted_req_ids or set()) | scheduler_output.finished_req_ids:
            self.requests.pop(request_id, None)
            self.tables.pop(request_id, None)
            self.observed.discard(request_id)
        counts, failed = Counts(), Failures(get_tensor_model_parallel_world_size())
        for data in scheduler_output.scheduled_new_reqs:
            with failed.catch(data.req_id):
                self.requests[data.req_id] = self._start(data)
                self.tables[data.req_id] = np.array(data.block_ids[0], dtype=np.int64)
        cached = scheduler_output.scheduled_cached_reqs
        for request_id, new in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if new is not None:
                self.tables[request_id] = np.concatenate([self.tables[request_id], np.array(new[0], dtype=np.int64)])
        scheduled = [request_id for request_id in scheduler_output.num_scheduled_tokens if request_id not in failed]
        if not scheduled and not failed:
            return EMPTY_MODEL_RUNNER_OUTPUT
        states = [self.requests[request_id] for request_id in scheduled]
        self.seeing.attach(self.observed, scheduled)
        outputs, commits = {}, {}
        pressure = getattr(scheduler_output, "pressure", 0.0)
        canvases = getattr(scheduler_output, "canvases", NO_SPECULATION)
        for reading in self.denoiser.step(states, self.tables, counts, failed, canvases):
            state = reading.state
            with failed.catch(state.req_id):
                out = state.canvas.emitted
                commit = state.commit(reading, pressure)
                outputs[state.req_id] = state.take_output()
                commits[state.req_id] = replace(commit, left=state.canvas.emitted - out)
        return make_output(outputs, commits, counts, failed, self.seeing.take())

    def _start(self, data: CanvasData) -> Denoising:
        assert data.canvas is not None, "the scheduler sends a canvas with every new request"
        params, canvas = data.sampling_params, data.canvas.copy()
        stop_ids = set(params.stop_token_ids or [])
        if params.eos_token_id is not None:
            stop_ids.add(params.eos_token_id)
        top_p, top_k = canvas.options.decoding.filters(params.top_p, max(params.top_k, 0))
        sampling = Sampling(
            temperature=params.temperature,
            top_p=top_p,
            top_k=top_k,
            seed=own_seed(data.req_id, self.model_config.seed) if params.seed is None else params.seed,
            stop_ids=frozenset(stop_ids),
            num_logprobs=params.logprobs,
        )
        if canvas.options.observed:
            self.observed.add(data.req_id)
        return Denoising(data.req_id, canvas, sampling)

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
    """Seed of a request without one, derived from its random id so that all tensor-parallel ranks agree"""
    return (zlib.crc32(request_id.encode()) + server_seed) % (1 << 63)
