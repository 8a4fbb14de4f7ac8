"""Classes of vLLM that this package extends, calls or reads. They may change with any version.

`python -m tools.vllm_signatures` records vLLM's definitions of these names. It finds imports from vLLM itself, and
patches.py has the patches.
"""

_SELECTING_CPU, _SELECTING_CUDA = "vllm_dlm.page_sparse.cpu", "vllm_dlm.page_sparse.cuda"
_FLASH = "vllm.v1.attention.backends.flash_attn"

#: (class of this package, class of vLLM that it inherits from or replaces)
BUILT_ON = (
    ("vllm_dlm.integration.scheduler.scheduler:DenoisingScheduler", "vllm.v1.core.sched.scheduler:Scheduler"),
    ("vllm_dlm.integration.worker.worker:DiffusionGPUWorker", "vllm.v1.worker.gpu_worker:Worker"),
    ("vllm_dlm.integration.worker.worker:DiffusionCPUWorker", "vllm.v1.worker.cpu_worker:CPUWorker"),
    ("vllm_dlm.integration.worker.runner:DenoisingRunner", "vllm.v1.worker.cpu_model_runner:CPUModelRunner"),
    ("vllm_dlm.integration.worker.selecting_worker:PageSelectionMixin", "vllm.v1.worker.gpu_worker:Worker"),
    ("vllm_dlm.integration.worker.selecting_worker:PageSelectionMixin", "vllm.v1.worker.cpu_worker:CPUWorker"),
    (f"{_SELECTING_CPU}:SelectingCPUBackend", "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend"),
    (f"{_SELECTING_CPU}:SelectingCPUBuilder", "vllm.v1.attention.backend:AttentionMetadataBuilder"),
    (f"{_SELECTING_CPU}:SelectingCPUImpl", "vllm.v1.attention.backend:AttentionImpl"),
    (f"{_SELECTING_CUDA}:SelectingFlashBackend", f"{_FLASH}:FlashAttentionBackend"),
    (f"{_SELECTING_CUDA}:SelectingFlashBuilder", f"{_FLASH}:FlashAttentionMetadataBuilder"),
    (f"{_SELECTING_CUDA}:SelectingFlashImpl", f"{_FLASH}:FlashAttentionImpl"),
    (
        "vllm_dlm.families.config:CheckedConvertor",
        "vllm.transformers_utils.model_arch_config_convertor:ModelArchConfigConvertorBase",
    ),
    (
        "vllm_dlm.integration.registration:DiffusionConfigHook",
        "vllm.model_executor.models.config:VerifyAndUpdateConfig",
    ),
    ("vllm_dlm.models.transformer:MaskedDiffusionLM", "vllm.model_executor.models.interfaces:SupportsQuant"),
    ("vllm_dlm.scoring.route:ServingScores", "vllm.entrypoints.serve.engine.serving:BaseServing"),
    ("vllm_dlm.integration.routes:Routes", "vllm.plugins.endpoint_plugins.interface:EndpointPlugin"),
    ("vllm_dlm.metrics:EnvelopeStatLogger", "vllm.v1.metrics.loggers:AggregateStatLoggerBase"),
    ("vllm_dlm.envelope:EnvelopeOutput", "vllm.v1.engine:EngineCoreOutput"),
    ("vllm_dlm.envelope:EnvelopeOutputs", "vllm.v1.engine:EngineCoreOutputs"),
    ("vllm_dlm.envelope:EnvelopeStats", "vllm.v1.metrics.stats:SchedulerStats"),
)

#: class -> attributes of its objects that this package uses
ASKED = {
    "vllm.v1.core.kv_cache_manager:KVCacheManager": (
        "new_step_starts", "allocate_slots", "get_blocks", "block_pool", "watermark_blocks", "max_model_len",
        "enable_caching", "prefix_cache_lookup_enabled", "record_prefix_cache_stats", "cache_blocks", "evict_blocks",
        "empty_kv_cache_blocks", "create_kv_cache_blocks", "get_block_ids", "coordinator",
    ),
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator": ("find_longest_cache_hit",),
    "vllm.v1.core.kv_cache_manager:KVCacheBlocks": ("get_block_ids",),
    "vllm.v1.core.block_pool:BlockPool": ("get_num_free_blocks", "num_gpu_blocks"),
    "vllm.v1.core.sched.output:NewRequestData": ("from_request",),
    "vllm.v1.core.sched.request_queue:RequestQueue": ("remove_request",),
    "vllm.v1.engine.async_llm:AsyncLLM": (
        "output_handler", "output_processor", "input_processor", "model_config", "errored", "dead_error",
    ),
    "vllm.v1.engine.llm_engine:LLMEngine": ("input_processor",),
    "vllm.v1.engine.output_processor:OutputProcessor": (
        "propagate_error", "request_states", "parent_requests", "tokenizer",
    ),
    "vllm.v1.engine.output_processor:RequestState": (
        "request_id", "prompt_token_ids", "request_index", "parent_req", "queue",
    ),
    "vllm.v1.engine.parallel_sampling:ParentRequest": ("request_id",),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels": ("model_name",),
    "vllm.entrypoints.serve.middleware.authenticate:AuthenticationMiddleware": ("verify_token",),
    "vllm.logprobs:Logprob": ("logprob", "rank"),
    "vllm.outputs:CompletionOutput": ("logprobs", "finish_reason", "stop_reason"),
    "vllm.v1.engine.input_processor:InputProcessor": (
        "model_config", "cache_config", "vllm_config", "get_tokenizer", "renderer",
    ),
    "vllm.renderers.base:BaseRenderer": ("tokenize_prompt", "tokenize_prompt_async", "default_cmpl_tok_params"),
    "vllm.renderers.params:TokenizeParams": ("with_kwargs",),
    "vllm.v1.metrics.loggers:PrometheusStatLogger": (
        "per_engine_labelvalues", "_spec_decoding_cls", "_counter_cls", "_gauge_cls",
    ),
    "vllm.v1.metrics.loggers:PerEngineStatLoggerAdapter": ("per_engine_stat_loggers",),
    "vllm.v1.metrics.loggers:StatLoggerManager": ("stat_loggers", "engine_indexes", "record", "log"),
    "vllm.v1.spec_decode.metrics:SpecDecodingProm": ("observe",),
    "vllm.v1.spec_decode.metrics:SpecDecodingLogging": ("observe", "log"),
    "vllm.v1.engine.core_client:MPClient": ("decoder",),
    "vllm.v1.engine:EngineCoreOutputs": ("outputs", "scheduler_stats"),
    "vllm.v1.request:Request": (
        "num_computed_tokens", "is_prefill_chunk", "num_tokens", "num_output_tokens", "num_prompt_tokens",
        "num_preemptions", "prefill_stats", "record_event", "take_events", "get_finished_reason", "client_index",
        "trace_headers", "all_token_ids", "sampling_params", "max_tokens", "status", "is_finished",
    ),
    "vllm.sampling_params:SamplingParams": ("_all_stop_token_ids", "stop_token_ids", "extra_args", "eos_token_id"),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": ("attn_groups", "input_batch"),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner": ("attn_groups", "req_states"),
    "vllm.config.model:ModelConfig": (
        "architecture", "hf_config", "override_generation_config", "generation_config", "get_vocab_size",
        "get_total_num_hidden_layers", "served_model_name", "is_mm_prefix_lm",
        "rswa_window", "use_mla", "is_hybrid", "is_attention_free",
    ),
    "vllm.config.cache:CacheConfig": ("block_size", "user_specified_block_size", "num_gpu_blocks", "cache_dtype"),
    "vllm.config.parallel:ParallelConfig": (
        "worker_cls", "data_parallel_size", "data_parallel_size_local", "data_parallel_rank_local",
        "local_engines_only",
    ),
    "vllm.config.scheduler:SchedulerConfig": (
        "scheduler_cls", "async_scheduling", "enable_chunked_prefill", "max_num_batched_tokens",
    ),
}  # fmt: skip

#: attribute of a worker, and the classes that use it; our runner must have the attributes that they use
ASKED_OF_THE_RUNNER = ("model_runner", ("vllm.v1.worker.gpu_worker:Worker", "vllm.v1.worker.cpu_worker:CPUWorker"))

#: differences between 0.32 and 0.33 that do not affect this package (patches list both signatures)
READ = {
    "vllm.config:VllmConfig": "watchdog_config, off unless a folder is given",
    "vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts": "hash_indices_table, for another router",
    "vllm.model_executor.layers.fused_moe:FusedMoEFactory": "moe_config_cls, with a default",
    "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead": "quant_method, for heads of drafts",
    "vllm.sampling_params:BeamSearchParams": "allowed_token_ids; beam search is refused",
    "vllm.v1.attention.backend:AttentionBackend": "supports_kv_cache_update_bypass, False, see page_sparse",
    "vllm.v1.attention.backends.flash_attn:FlashAttentionBackend": "supports_kv_cache_update_bypass, see page_sparse",
    "vllm.v1.attention.backends.flash_attn:FlashAttentionBackend.supports_kv_cache_update_bypass": "new, set to False",
    "vllm.v1.attention.backends.registry:AttentionBackendEnum": "other backends",
    "vllm.v1.core.kv_cache_manager:KVCacheManager": "num_hash_lookahead_tokens, for drafts; set by vLLM",
    "vllm.v1.core.sched.output:SchedulerOutput": "two fields with defaults, for encoders and drafts",
    "vllm.v1.engine:EngineCoreOutput": "error, for requests that never ran; ours set finish_reason and stop_reason",
    "vllm.v1.worker.cpu_worker:CPUWorker asks its model_runner for": "eplb, of model runner V2 alone",
    "vllm.v1.worker.gpu_worker:Worker asks its model_runner for": "eplb, of model runner V2 alone",
    "vllm.vllm_flash_attn:flash_attn_varlen_func": "two arguments with defaults",
}
