"""Every place where vLLM itself is changed, in two tables: functions that are wrapped (`PATCHES`) and attributes of its
objects that are set (`WRITES`). Only gate.py, when the plugin is disabled, replaces another function of vLLM's. What is
overridden in subclasses is in overrides.py.

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
    prompts,
    requests,
    routes,
    shutdown,
    view,
)
from vllm_dlm.integration.patching import Patch, WhenImported, Write, wrap


def attention_init(init: Callable) -> Callable:
    """Imports vLLM's attention, which only workers do."""
    from vllm_dlm.page_sparse.layer_backends import with_selection

    return with_selection(init)


PATCHES = (
    # -- flags and configuration ---------------------------------------------------------------
    Patch(
        "vllm.engine.arg_utils:EngineArgs", "add_cli_args", cli.add_cli_args,
        "No hook for flags of plugins: --plugin and --dlm-config.",
        ("(parser)",),
    ),
    Patch(
        "vllm.engine.arg_utils:EngineArgs", "from_cli_args", cli.from_cli_args,
        "--dlm-config becomes the `dlm` object of additional_config.",
        ("(cls, args)",),
    ),
    Patch(
        "vllm.engine.arg_utils:EngineArgs", "_set_default_chunked_prefill_and_prefix_caching_args", cli.set_defaults,
        "Flags that a user set can be told from vLLM's defaults only before vLLM fills those in.",
        ("(self, model_config)",),
    ),
    Patch(
        "vllm.transformers_utils.config:HFConfigParser", "parse", dispatch.parse,
        "vLLM reads a config.json by its model_type, and some diffusion models have that of autoregressive ones.",
        ("(self, model, trust_remote_code, revision=, code_revision=, **kwargs)",),
    ),
    Patch(
        "vllm.config.vllm:VllmConfig", "try_verify_and_update_config", autoregressive.try_verify_and_update_config,
        "The one hook that sees every model: a selection is checked and gets its worker.",
        ("(self)",),
    ),
    Patch(
        "vllm.config.model:ModelConfig", "get_diff_sampling_param", canvas.get_diff_sampling_param,
        "A request without a length would get all that the model's length leaves.",
        ("(self)",),
    ),
    # -- requests ------------------------------------------------------------------------------
    Patch(
        "vllm.renderers.base:BaseRenderer", "_tokenize_prompt", prompts.tokenize_prompt,
        "Mask tokens that a client typed are text, those among ids are filled. Later they cannot be told apart.",
        ("(self, prompt, params)",),
    ),
    Patch(
        "vllm.v1.engine.input_processor:InputProcessor", "process_inputs", requests.process_inputs,
        "Sees every request of `LLM` and of the servers. An error later would end the engine for all clients.",
        ("(self, request_id, prompt, params, supported_tasks, arrival_time=, lora_request=, tokenization_kwargs=, "
         "trace_headers=, priority=, data_parallel_rank=, resumable=, session_id=, kv_hints=)",),
    ),
    Patch(
        "vllm.v1.engine.input_processor:InputProcessor", "resolve_watermarking", requests.resolve_watermarking,
        "Beam search never sends its parameters to the engine, but both of its front-ends pass them to this.",
        ("(self, params)",),
    ),
    Patch(
        "vllm.v1.engine.async_llm:AsyncLLM", "generate", requests.generate,
        "A stream's headers are sent before its request is processed; here it can still be answered with 400. The live "
        "view follows the outputs of observed requests.",
        ("async (self, prompt, sampling_params, request_id, *, prompt_text=, lora_request=, tokenization_kwargs=, "
         "trace_headers=, priority=, data_parallel_rank=, session_id=, kv_hints=, reasoning_ended=, "
         "reasoning_parser_kwargs=)",),
    ),
    Patch(
        "vllm.entrypoints.serve.engine.serving:BaseServing", "_check_model", bodies.check_model,
        "Every route calls it first. vLLM would drop `dlm_*` fields next to `vllm_xargs` silently.",
        ("async (self, request)",),
        at="import",
    ),
    Patch(
        "vllm.entrypoints.openai.responses.serving:OpenAIServingResponses", "_generate_with_builtin_tools",
        bodies.generate_with_builtin_tools,
        "A generator: its request would be checked when the response has begun.",
        ("async (self, request_id, engine_input, sampling_params, context, tok_params=, lora_request=, priority=, "
         "trace_headers=, session_id=, reasoning_parser_kwargs=)",
         "async (self, request_id, engine_input, sampling_params, context, tok_params=, lora_request=, priority=, "
         "trace_headers=, session_id=, data_parallel_rank=, reasoning_parser_kwargs=, reasoning_ended=, "
         "max_tool_calls=)"),
        at="import",
    ),
    Patch(
        "vllm.v1.engine.async_llm:AsyncLLM", "shutdown", shutdown.shutdown,
        "During a long step the engine cannot report its requests as aborted, and the server waits for them.",
        ("(self, timeout=)",),
    ),
    # -- frames --------------------------------------------------------------------------------
    Patch(
        "vllm.v1.engine.input_processor:InputProcessor", "assign_request_id", view.assign_request_id,
        "An engine's messages name requests by vLLM's internal id, which is unique and made here.",
        ("(request)",),
    ),
    Patch(
        "vllm.v1.engine.output_processor:OutputProcessor", "process_outputs", view.process_outputs,
        "Messages of the live view arrive among the engine's outputs and are taken out before vLLM processes those.",
        ("(self, engine_core_outputs, engine_core_timestamp=, iteration_stats=, weight_version=)",),
    ),
    Patch(
        "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion", "create_completion",
        view.create_completion,
        "Frames go between the chunks of a stream, and trajectories into a response.",
        ("async (self, request, raw_request=)",),
        at="import",
    ),
    Patch(
        "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat", "create_chat_completion",
        view.create_chat_completion,
        "As above, of chats.",
        ("async (self, request, raw_request=)",),
        at="import",
    ),
    Patch(
        "vllm.plugins", "load_endpoint_plugins", routes.load_endpoint_plugins,
        "The score's route and those of --dlm-view, see routes.py. vLLM takes routes of plugins that VLLM_PLUGINS "
        "names, and warns if it is not set.",
        ("(supported_tasks=)",),
    ),
    # -- steps and counters --------------------------------------------------------------------
    Patch(
        "vllm.v1.core.sched.scheduler:Scheduler", "update_from_output", autoregressive.update_from_output,
        "Takes the page counts of a step from the worker's output to the front-end.",
        ("(self, scheduler_output, model_runner_output)",),
    ),
    Patch(
        "vllm.v1.engine.core_client:MPClient", "__init__", envelope.client_init,
        "The front-end decodes the envelope, which vLLM's messages have no field for.",
        ("(self, asyncio_mode, vllm_config, executor_class, log_stats, client_addresses=, renderer=)",),
    ),
    Patch(
        "vllm.v1.metrics.loggers:StatLoggerManager", "__init__", metrics.stat_loggers,
        "One more stat logger for the counters of the envelope. vLLM's would have to be named on the command line.",
        ("(self, vllm_config, engine_idxs=, custom_stat_loggers=, enable_default_loggers=, aggregate_engine_logging=, "
         "client_count=)",),
    ),
    Patch(
        "vllm.model_executor.layers.attention.attention:Attention", "__init__", attention_init,
        "No model of vLLM's lets its layers be given a backend; those that choose pages get one.",
        ("(self, num_heads, head_size, scale, num_kv_heads=, alibi_slopes=, use_alibi_sqrt=, cache_config=, "
         "quant_config=, logits_soft_cap=, per_layer_sliding_window=, prefix=, attn_type=, "
         "kv_sharing_target_layer_name=, mm_prefix_clamp_sliding_window=, attn_backend=, head_size_v=, "
         "**extra_impl_args)",),
        at="worker",
    ),
)  # fmt: skip


#: where each was read: 0.32 and 0.33
WRITES = (
    # -- models and configuration --------------------------------------------------------------
    Write(
        "vllm.model_executor.models.config", ("MODELS_CONFIG_MAP",), "integration/registration.py",
        "vLLM calls the hook of an architecture to complete a configuration.",
    ),
    Write(
        "vllm.transformers_utils.config", ("_CONFIG_REGISTRY",), "integration/registration.py",
        "How the config.json of a model type is read.",
    ),
    Write(
        "vllm.transformers_utils.model_arch_config_convertor", ("MODEL_ARCH_CONFIG_CONVERTORS",),
        "integration/registration.py", "A config.json is checked when vLLM converts it.",
    ),
    Write(
        "vllm.config.scheduler:SchedulerConfig",
        ("scheduler_cls", "async_scheduling", "enable_chunked_prefill", "max_num_batched_tokens"),
        "integration/registration.py", "Our scheduler, and what it does not support.",
    ),
    Write(
        "vllm.config.parallel:ParallelConfig", ("worker_cls",), "integration/registration.py",
        "Our worker.",
    ),
    Write(
        "vllm.config.cache:CacheConfig", ("block_size", "user_specified_block_size", "enable_prefix_caching"),
        "integration/registration.py", "Units of a selection fill blocks; prefixes are shared where keys are final.",
    ),
    Write(
        "vllm.config.compilation:CompilationConfig", ("mode", "cudagraph_mode"), "integration/registration.py",
        "Steps are captured by step/captured.py.",
    ),
    Write(
        "vllm.config.model:ModelConfig", ("max_model_len",), "integration/registration.py",
        "The length for which a family was trained is the default.",
    ),
    Write(
        "vllm.config.parallel:ParallelConfig", ("worker_cls",), "integration/autoregressive.py",
        "The worker with summaries of pages.",
    ),
    Write(
        "vllm.config.cache:CacheConfig", ("block_size", "user_specified_block_size"), "integration/autoregressive.py",
        "Pages are parts of blocks.",
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
        "integration/bodies.py", "Defaults of a family for its chat template.",
    ),
    Write(
        "vllm.v1.engine:EngineCoreRequest", ("prompt_token_ids", "cache_salt"), "integration/requests.py",
        "The prompt as the model reads it, and what its keys depend on in addition to it.",
    ),
    Write(
        "vllm.sampling_params:SamplingParams",
        ("max_tokens", "extra_args", "stop_token_ids", "_all_stop_token_ids", "top_k", "seed"),
        "integration/requests.py", "The canvas, the end of a turn, and numbers that numpy can hold.",
    ),
    # -- engine --------------------------------------------------------------------------------
    Write(
        "vllm.v1.request:Request", ("num_computed_tokens", "is_prefill_chunk", "status"),
        "integration/scheduler/scheduler.py", "As vLLM's own scheduler sets them.",
    ),
    Write(
        "vllm.v1.core.kv_cache_manager:KVCacheManager", ("max_model_len",), "integration/scheduler/canvas_memory.py",
        "A canvas may take more blocks than its tokens fill.",
    ),
    Write(
        "vllm.v1.worker.cpu_worker", ("CPUModelRunner",), "integration/worker/worker.py",
        "The CPU worker builds its runner inline; while it does, it finds ours.",
    ),
    Write(
        "vllm.v1.engine:EngineCoreOutputs", ("scheduler_stats",), "integration/autoregressive.py",
        "Page counts of a step, in an envelope.",
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
    """Of the workers whose model decodes with a selection."""
    for patch in PATCHES:
        if patch.at == "worker":
            wrap(patch)
