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
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, LogprobsLists, ModelRunnerOutput

from vllm_dlm.engine.forward import Stream, denoise, split
from vllm_dlm.engine.head import Head, HeadRequest
from vllm_dlm.engine.request import Denoising, Sampling
from vllm_dlm.integration.registration import resolved_options
from vllm_dlm.options import request_options

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
        config = self.model_config.hf_config
        self.head = Head(self.model.compute_logits, config.vocab_size, config.eos_token_id, config.eot_token_id)

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
                    kv_cache_config.num_blocks, spec.num_kv_heads, spec.block_size, 2 * spec.head_size,
                    dtype=spec.dtype, device=self.device,
                )
                for spec in self.get_kv_cache_spec().values()
            ]  # per layer [blocks, Hkv, block_size, 2 * D], keys before values

    @torch.inference_mode()
    def profile_run(self, **_) -> None:
        """The largest step there can be: every row of the budget, and a full piece of logits being sampled."""
        rows = np.arange(self.max_rows)
        canvases = [np.zeros(len(part), dtype=np.int64) for part in np.array_split(rows, -(-len(rows) // self.max_model_len))]
        # every row as a head row: then no row is dropped in the last layer
        hidden = denoise(self.model, [Stream(ids, np.arange(len(ids))) for ids in canvases], self.device)
        options = request_options(self.options, {"dlm_cfg_scale": 1.0})
        sampling = Sampling(temperature=1.0, top_p=0.9, top_k=0, seed=0, stop_ids=frozenset(), num_logprobs=0)
        count = min(len(hidden), self.head.max_rows)
        state = Denoising.start("profile", options, sampling, 0, 0, [], max(count, len(options.decoding.blocks(count))))
        part = np.arange(count)
        self.head.run(hidden, [HeadRequest(state, part, part, part)])

    warming_up_model = profile_run

    def _dummy_run(self, num_tokens: int, **_) -> None:
        """Data-parallel peers keep step with a forward nobody reads."""
        count = max(1, min(num_tokens, self.max_model_len))
        with torch.inference_mode():
            denoise(self.model, [Stream(np.zeros(count, dtype=np.int64), np.zeros(1, dtype=np.int64))], self.device)

    # -- a step ----------------------------------------------------------------------------

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput, intermediate_tensors=None) -> ModelRunnerOutput:
        for request_id in (*scheduler_output.finished_req_ids, *(scheduler_output.preempted_req_ids or ())):
            self.requests.pop(request_id, None)
        for data in scheduler_output.scheduled_new_reqs:
            self.requests[data.req_id] = self._start(data)
        states = [self.requests[request_id] for request_id in scheduler_output.num_scheduled_tokens]
        if not states:
            return EMPTY_MODEL_RUNNER_OUTPUT
        for request in self._denoise(states):
            request.state.commit(request.positions, request.proposal, request.logprobs)
        return self._output(states)

    def _start(self, data: NewRequestData) -> Denoising:
        params = data.sampling_params
        prompt_len = len(data.prompt_token_ids)
        stop_ids = set(params.stop_token_ids or [])
        if params.eos_token_id is not None:
            stop_ids.add(params.eos_token_id)
        sampling = Sampling(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=max(params.top_k, 0),
            # Without a seed the request's own (random) name is one: the same on every tensor-parallel rank.
            seed=params.seed if params.seed is not None else zlib.crc32(data.req_id.encode()) + self.model_config.seed,
            stop_ids=frozenset(stop_ids),
            num_logprobs=params.logprobs,
        )
        return Denoising.start(
            data.req_id,
            request_options(self.options, params.extra_args),
            sampling,
            self.model_config.hf_config.mask_token_id,
            prompt_len,
            data.prefill_token_ids,
            min(prompt_len + params.max_tokens, self.max_model_len),
        )

    def _denoise(self, states: list[Denoising]) -> list[HeadRequest]:
        streams, requests, row = [], [], 0
        for state in states:
            positions = state.candidates()
            # Dream's logits at i predict i + 1; position 0 falls back on its own row.
            heads = np.maximum(positions - self.model.shift, 0)
            rows = [np.arange(row + i * len(heads), row + (i + 1) * len(heads)) for i in range(state.streams)]
            row += state.streams * len(heads)
            streams.append(Stream(state.canvas, heads))
            if state.streams == 2:
                streams.append(Stream(state.unconditional(), heads))
            requests.append(HeadRequest(state, positions, rows[0], rows[1] if state.streams == 2 else None))
        groups = split(streams, self.max_rows)
        hidden = [denoise(self.model, group, self.device) for group in groups]
        self.head.run(torch.cat(hidden) if len(hidden) > 1 else hidden[0], requests)
        return requests

    def _output(self, states: list[Denoising]) -> ModelRunnerOutput:
        outputs = [state.take_output() for state in states]
        return ModelRunnerOutput(
            req_ids=[state.req_id for state in states],
            req_id_to_index={state.req_id: index for index, state in enumerate(states)},
            sampled_token_ids=[tokens for tokens, _ in outputs],
            logprobs=logprobs_lists(states, outputs),
        )

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


def logprobs_lists(states: list[Denoising], outputs: list[tuple[list[int], list]]) -> LogprobsLists | None:
    """vLLM's rectangular log-probabilities of all tokens handed out in this step; rows nobody asked for are blank."""
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
