"""Every place where vLLM itself is changed: one row each. Only gate.py, when the plugin is disabled, replaces another
attribute of vLLM's. What is overridden in subclasses is in overrides.py.

A wrapper is given vLLM's function and returns what stands in its place. The signatures are those it was written
against; `python -m tools.vllm_signatures` reads them from another vLLM.
"""

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any, Literal

import vllm

from vllm_dlm import envelope, metrics
from vllm_dlm.integration import autoregressive, bodies, canvas, cli, prompts, requests, routes, shutdown, view
from vllm_dlm.integration.signatures import in_source, of_function


@dataclass(frozen=True)
class Patch:
    owner: str  # "module:Class", or "module"
    name: str
    wrapper: Callable[[Callable], Callable]
    why: str
    signatures: tuple[str, ...]  # any of them is right; see signatures.py
    #: when: as the process starts; once a server imports the owner; in a worker that asks for it
    at: Literal["start", "import", "worker"] = "start"

    @property
    def module(self) -> str:
        return self.owner.partition(":")[0]


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
        "What a user switched on can be told from vLLM's defaults only before those are filled in.",
        ("(self, model_config)",),
    ),
    Patch(
        "vllm.config.vllm:VllmConfig", "try_verify_and_update_config", autoregressive.try_verify_and_update_config,
        "The one hook that sees every model: a selection is checked and gets its worker.",
        ("(self)",),
    ),
    Patch(
        "vllm.config.model:ModelConfig", "get_diff_sampling_param", canvas.get_diff_sampling_param,
        "The length of a response nobody named would be all that the model's length leaves.",
        ("(self)",),
    ),
    # -- requests ------------------------------------------------------------------------------
    Patch(
        "vllm.renderers.base:BaseRenderer", "_tokenize_prompt", prompts.tokenize_prompt,
        "Mask tokens that a client typed are text, those among ids are holes; later nobody knows which was which.",
        ("(self, prompt, params)",),
    ),
    Patch(
        "vllm.v1.engine.input_processor:InputProcessor", "process_inputs", requests.process_inputs,
        "Sees every request of `LLM` and of the servers: an error further on would end the engine for everybody.",
        ("(self, request_id, prompt, params, supported_tasks, arrival_time=, lora_request=, tokenization_kwargs=, "
         "trace_headers=, priority=, data_parallel_rank=, resumable=, session_id=, kv_hints=)",),
    ),
    Patch(
        "vllm.v1.engine.input_processor:InputProcessor", "resolve_watermarking", requests.resolve_watermarking,
        "Beam search never sends its parameters to the engine; both of its front-ends show them here.",
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
        "Every route asks it first: `dlm_*` beside `vllm_xargs` would be dropped without a word.",
        ("async (self, request)",),
        at="import",
    ),
    Patch(
        "vllm.entrypoints.openai.responses.serving:OpenAIServingResponses", "_generate_with_builtin_tools",
        bodies.generate_with_builtin_tools,
        "A generator: its request would be looked at when the response is under way.",
        ("async (self, request_id, engine_input, sampling_params, context, tok_params=, lora_request=, priority=, "
         "trace_headers=, session_id=, reasoning_parser_kwargs=)",
         "async (self, request_id, engine_input, sampling_params, context, tok_params=, lora_request=, priority=, "
         "trace_headers=, session_id=, data_parallel_rank=, reasoning_parser_kwargs=, reasoning_ended=, "
         "max_tool_calls=)"),
        at="import",
    ),
    Patch(
        "vllm.v1.engine.async_llm:AsyncLLM", "shutdown", shutdown.shutdown,
        "Within a long step the engine cannot report its requests as aborted, and the server waits for them.",
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
        "Messages about steps come among the engine's outputs, and are no outputs to vLLM.",
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


#: attribute of what stands in the place of vLLM's functions
INSTALLED = "_dlm"


def wrap(patch: Patch) -> None:
    """Puts the wrapper in place, unless it is there."""
    owner, original = _found(patch)
    kind = type(original) if isinstance(original, (staticmethod, classmethod)) else None
    function = original.__func__ if kind else original
    if getattr(function, INSTALLED, False):
        return
    wrapped = functools.wraps(function)(patch.wrapper(function))
    vars(wrapped)[INSTALLED] = True
    setattr(owner, patch.name, kind(wrapped) if kind else wrapped)


def mismatch(patch: Patch) -> str | None:
    """What is not as the wrapper expects it. Of an owner that no server has imported, by its source."""
    place, signature, why = f"{patch.owner}.{patch.name}", None, ""
    if patch.at == "start" or patch.module in sys.modules:
        try:
            _, found = _found(patch)
            signature = of_function(getattr(found, "__func__", found))
        except (ImportError, AttributeError) as error:
            why = f" ({error})"
    else:
        signature = in_source(Path(vllm.__path__[0]), patch.owner, patch.name)
    if signature is None:
        return f"{place} is not there{why}"
    return None if signature in patch.signatures else f"{place} is {signature}"


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


class WhenImported(MetaPathFinder):
    """Importing what only servers need takes long in every other process: such owners are patched once they came."""

    def __init__(self, late: dict[str, list[Patch]]):
        self.late = late

    def find_spec(self, name: str, path=None, target=None):
        if (patches := self.late.pop(name, None)) is None:
            return None
        spec = importlib.util.find_spec(name)  # by the other finders, since the name is no longer here
        loader: Any = spec and spec.loader
        execute = loader.exec_module

        def execute_and_patch(module):
            execute(module)
            for patch in patches:
                wrap(patch)

        loader.exec_module = execute_and_patch
        return spec


def owner_of(patch: Patch) -> Any:
    _, _, cls = patch.owner.partition(":")
    module = importlib.import_module(patch.module)
    return getattr(module, cls) if cls else module


def _found(patch: Patch) -> tuple[Any, Any]:
    owner = owner_of(patch)
    return owner, inspect.getattr_static(owner, patch.name)
