"""All changes of vLLM, in two tables: wrapped functions (`PATCHES`) and assigned attributes (`WRITES`). The only other
one is in gate.py, while the plugin is disabled. Overridden methods are in overrides.py.

`python -m tools.vllm_signatures` reads signatures and attributes from another vLLM. tests/integration/test_patches.py
compares the tables with the code.
"""

import sys
from collections.abc import Callable

from vllm_dlm import envelope, metrics
from vllm_dlm.integration import (
    autoregressive,
    bodies,
    canvas,
    cli,
    dispatch,
    pieces,
    prompts,
    requests,
    routes,
    shutdown,
    view,
)
from vllm_dlm.integration.patching import Patch, WhenImported, Write, wrap


def attention_init(init: Callable) -> Callable:
    """Imports vLLM's attention, so only workers may call it."""
    from vllm_dlm.page_sparse.layer_backends import with_selection

    return with_selection(init)


PATCHES = (
    # -- flags and configuration ---------------------------------------------------------------
    Patch(
        "vllm.engine.arg_utils:EngineArgs", "add_cli_args", cli.add_cli_args,
        "Adds --plugin, --dlm-config and --dlm-view. vLLM has no hook for flags of plugins.",
        ("(parser)",),
    ),
    Patch(
        "vllm.engine.arg_utils:EngineArgs", "from_cli_args", cli.from_cli_args,
        "Moves --dlm-config to the `dlm` object of additional_config.",
        ("(cls, args)",),
    ),
    Patch(
        "vllm.engine.arg_utils:EngineArgs", "_set_default_chunked_prefill_and_prefix_caching_args", cli.set_defaults,
        "Checks flags before vLLM fills in its defaults; afterwards they cannot be distinguished.",
        ("(self, model_config)",),
    ),
    Patch(
        "vllm.transformers_utils.config:HFConfigParser", "parse", dispatch.parse,
        "vLLM reads config.json by its model_type. Some diffusion models have an autoregressive model's.",
        ("(self, model, trust_remote_code, revision=, code_revision=, **kwargs)",),
    ),
    Patch(
        "vllm.config.vllm:VllmConfig", "try_verify_and_update_config", autoregressive.try_verify_and_update_config,
        "The only hook called for every model: checks a selection and sets its worker.",
        ("(self)",),
    ),
    Patch(
        "vllm.config.model:ModelConfig", "get_diff_sampling_param", canvas.get_diff_sampling_param,
        "Adds the default length of a response. vLLM's default is the model's length minus the prompt.",
        ("(self)",),
    ),
    # -- requests ------------------------------------------------------------------------------
    Patch(
        "vllm.renderers.base:BaseRenderer", "_tokenize_prompt", prompts.tokenize_prompt,
        "Marks prompts written as text: masks in text are literal, masks among token ids are filled.",
        ("(self, prompt, params)",),
    ),
    Patch(
        "vllm.v1.engine.input_processor:InputProcessor", "process_inputs", requests.process_inputs,
        "Checks every request of `LLM` and of servers. A later error would stop the engine for all clients.",
        ("(self, request_id, prompt, params, supported_tasks, arrival_time=, lora_request=, tokenization_kwargs=, "
         "trace_headers=, priority=, data_parallel_rank=, resumable=, session_id=, kv_hints=)",),
    ),
    Patch(
        "vllm.v1.engine.input_processor:InputProcessor", "resolve_watermarking", requests.resolve_watermarking,
        "Rejects beam search, whose parameters are not sent to the engine but pass through this function.",
        ("(self, params)",),
    ),
    Patch(
        "vllm.v1.engine.async_llm:AsyncLLM", "generate", requests.generate,
        "Rejects invalid requests with 400 before the headers of a stream are sent, and passes the outputs of observed "
        "requests to the live view.",
        ("async (self, prompt, sampling_params, request_id, *, prompt_text=, lora_request=, tokenization_kwargs=, "
         "trace_headers=, priority=, data_parallel_rank=, session_id=, kv_hints=, reasoning_ended=, "
         "reasoning_parser_kwargs=)",),
    ),
    Patch(
        "vllm.entrypoints.serve.engine.serving:BaseServing", "_check_model", bodies.check_model,
        "Every route calls it first. vLLM would silently drop `dlm_*` fields next to `vllm_xargs`.",
        ("async (self, request)",),
        at="import",
    ),
    Patch(
        "vllm.entrypoints.openai.responses.serving:OpenAIServingResponses", "_generate_with_builtin_tools",
        bodies.generate_with_builtin_tools,
        "Checks the request before the response begins; the function is a generator.",
        ("async (self, request_id, engine_input, sampling_params, context, tok_params=, lora_request=, priority=, "
         "trace_headers=, session_id=, reasoning_parser_kwargs=)",
         "async (self, request_id, engine_input, sampling_params, context, tok_params=, lora_request=, priority=, "
         "trace_headers=, session_id=, data_parallel_rank=, reasoning_parser_kwargs=, reasoning_ended=, "
         "max_tool_calls=)"),
        at="import",
    ),
    Patch(
        "vllm.v1.engine.async_llm:AsyncLLM", "shutdown", shutdown.shutdown,
        "Fails open requests: during a long step the engine cannot report them as aborted, and the server waits.",
        ("(self, timeout=)",),
    ),
    # -- frames --------------------------------------------------------------------------------
    Patch(
        "vllm.v1.engine.input_processor:InputProcessor", "assign_request_id", view.assign_request_id,
        "Binds observed requests to vLLM's internal id, which identifies them in the engine's messages.",
        ("(request)",),
    ),
    Patch(
        "vllm.v1.engine.output_processor:OutputProcessor", "process_outputs", view.process_outputs,
        "Removes messages of the live view from the engine's outputs before vLLM processes them.",
        ("(self, engine_core_outputs, engine_core_timestamp=, iteration_stats=, weight_version=)",),
    ),
    Patch(
        "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion", "create_completion",
        view.create_completion,
        "Adds frames to the chunks of a stream, and trajectories to a response.",
        ("async (self, request, raw_request=)",),
        at="import",
    ),
    Patch(
        "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat", "create_chat_completion",
        view.create_chat_completion,
        "The same for chats.",
        ("async (self, request, raw_request=)",),
        at="import",
    ),
    Patch(
        "vllm.plugins", "load_endpoint_plugins", routes.load_endpoint_plugins,
        "Adds the routes of scores and of --dlm-view (routes.py). vLLM only loads routes of plugins named in "
        "VLLM_PLUGINS, and warns if it is not set.",
        ("(supported_tasks=)",),
    ),
    # -- steps and counters --------------------------------------------------------------------
    Patch(
        "vllm.v1.core.sched.scheduler:Scheduler", "update_from_output", autoregressive.update_from_output,
        "Passes the page counts of a step from the worker's output to the front-end.",
        ("(self, scheduler_output, model_runner_output)",),
    ),
    Patch(
        "vllm.v1.engine.core_client:MPClient", "__init__", envelope.client_init,
        "Makes the front-end decode the envelope, for which vLLM's messages have no field.",
        ("(self, asyncio_mode, vllm_config, executor_class, log_stats, client_addresses=, renderer=)",),
    ),
    Patch(
        "vllm.v1.engine.core_client:AsyncMPClient", "get_output_async", pieces.get_output_async,
        "A step can fill a canvas, whose log-probabilities would hold the event loop for a second.",
        ("async (self)",),
    ),
    Patch(
        "vllm.v1.metrics.loggers:StatLoggerManager", "__init__", metrics.stat_loggers,
        "Adds a stat logger for the counters in envelopes. vLLM's hook requires a command-line flag.",
        ("(self, vllm_config, engine_idxs=, custom_stat_loggers=, enable_default_loggers=, aggregate_engine_logging=, "
         "client_count=)",),
    ),
    Patch(
        "vllm.model_executor.layers.attention.attention:Attention", "__init__", attention_init,
        "Sets the attention backend of layers that select pages; vLLM's models have no parameter for it.",
        ("(self, num_heads, head_size, scale, num_kv_heads=, alibi_slopes=, use_alibi_sqrt=, cache_config=, "
         "quant_config=, logits_soft_cap=, per_layer_sliding_window=, prefix=, attn_type=, "
         "kv_sharing_target_layer_name=, mm_prefix_clamp_sliding_window=, attn_backend=, head_size_v=, "
         "**extra_impl_args)",),
        at="worker",
    ),
)  # fmt: skip


#: read in vLLM 0.32 and 0.33
WRITES = (
    # -- models and configuration --------------------------------------------------------------
    Write(
        "vllm.model_executor.models.config", ("MODELS_CONFIG_MAP",), "integration/registration.py",
        "vLLM calls the hook of an architecture to complete a configuration.",
    ),
    Write(
        "vllm.transformers_utils.config", ("_CONFIG_REGISTRY",), "integration/registration.py",
        "Class that reads the config.json of a model type.",
    ),
    Write(
        "vllm.transformers_utils.model_arch_config_convertor", ("MODEL_ARCH_CONFIG_CONVERTORS",),
        "integration/registration.py", "Checks a config.json when vLLM converts it.",
    ),
    Write(
        "vllm.config.scheduler:SchedulerConfig",
        ("scheduler_cls", "async_scheduling", "enable_chunked_prefill", "max_num_batched_tokens"),
        "integration/registration.py", "Sets our scheduler and disables features that it does not support.",
    ),
    Write(
        "vllm.config.parallel:ParallelConfig", ("worker_cls",), "integration/registration.py",
        "Our worker.",
    ),
    Write(
        "vllm.config.cache:CacheConfig", ("block_size", "user_specified_block_size", "enable_prefix_caching"),
        "integration/registration.py", "Blocks hold whole units of a selection; only final keys are shared.",
    ),
    Write(
        "vllm.config.compilation:CompilationConfig", ("mode", "cudagraph_mode"), "integration/registration.py",
        "Steps are captured by step/captured.py.",
    ),
    Write(
        "vllm.config.model:ModelConfig", ("max_model_len",), "integration/registration.py",
        "The default is the length for which a family was trained.",
    ),
    Write(
        "vllm.config.parallel:ParallelConfig", ("worker_cls",), "integration/autoregressive.py",
        "The worker with page summaries.",
    ),
    Write(
        "vllm.config.cache:CacheConfig", ("block_size", "user_specified_block_size"), "integration/autoregressive.py",
        "Blocks must hold whole pages.",
    ),
    Write(
        "vllm.engine.arg_utils:EngineArgs", ("additional_config",), "integration/cli.py",
        "Our flags become objects of additional_config.",
    ),
    # -- requests ------------------------------------------------------------------------------
    Write(
        "vllm.entrypoints.openai.completion.protocol:CompletionRequest", ("suffix", "vllm_xargs"),
        "integration/bodies.py", "A suffix and a template's mark become options of the request.",
    ),
    Write(
        "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest", ("chat_template_kwargs",),
        "integration/bodies.py", "A family's defaults for its chat template.",
    ),
    Write(
        "vllm.v1.engine:EngineCoreRequest", ("prompt_token_ids", "cache_salt"), "integration/requests.py",
        "The token ids that the model reads, and a salt for the prefix cache.",
    ),
    Write(
        "vllm.sampling_params:SamplingParams",
        ("max_tokens", "extra_args", "stop_token_ids", "_all_stop_token_ids", "top_k", "seed"),
        "integration/requests.py", "The canvas request, end-of-turn tokens, and numbers within numpy's range.",
    ),
    # -- engine --------------------------------------------------------------------------------
    Write(
        "vllm.v1.request:Request", ("num_computed_tokens", "is_prefill_chunk", "status"),
        "integration/scheduler/scheduler.py", "Set as in vLLM's own scheduler.",
    ),
    Write(
        "vllm.v1.core.kv_cache_manager:KVCacheManager", ("max_model_len",), "integration/scheduler/canvas_memory.py",
        "A canvas may use more blocks than its tokens fill.",
    ),
    Write(
        "vllm.v1.worker.cpu_worker", ("CPUModelRunner",), "integration/worker/worker.py",
        "The CPU worker creates its runner inline, so the class is replaced during that call.",
    ),
    Write(
        "vllm.v1.engine:EngineCoreOutputs", ("scheduler_stats",), "integration/autoregressive.py",
        "Adds the page counts of a step in an envelope.",
    ),
)  # fmt: skip


def apply_patches() -> None:
    late: dict[str, list[Patch]] = {}
    for patch in PATCHES:
        if patch.at == "start" or (patch.at == "import" and patch.module in sys.modules):
            wrap(patch)
        elif patch.at == "import":
            late.setdefault(patch.module, []).append(patch)
    if late and not any(isinstance(finder, WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, WhenImported(late))


def patch_worker() -> None:
    """Applies the patches for workers whose model decodes with a selection."""
    for patch in PATCHES:
        if patch.at == "worker":
            wrap(patch)
