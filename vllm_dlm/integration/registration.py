"""Registers the models with vLLM and configures the engine that serves them.

Read in vLLM 0.32 and 0.33: model_executor/models/config.py (`MODELS_CONFIG_MAP`),
transformers_utils/config.py (`_CONFIG_REGISTRY`), config/vllm.py
(`try_verify_and_update_config`).
"""

import re

from vllm.logger import init_logger

from vllm_dlm import __version__
from vllm_dlm.canvas.block_causal import CHUNK
from vllm_dlm.configuration import LEFT, TRAINED, resolved_options, trained_fields, written_object
from vllm_dlm.families import FAMILIES, record_of
from vllm_dlm.families.family import imported
from vllm_dlm.integration.gate import warn_once
from vllm_dlm.options import OptionError

logger = init_logger(f"vllm.{__name__}")

WORKERS = {
    "cpu": "vllm_dlm.integration.worker.worker.DiffusionCPUWorker",
    "cuda": "vllm_dlm.integration.worker.worker.DiffusionGPUWorker",
}


def blamed(vllm_config, error: OptionError) -> str:
    """The message of an option error, prefixed with the source of the option"""
    if field := re.match(r"dlm\.selection\.(\w+)", str(error)):
        named = (written_object(vllm_config) or {}).get("selection") or {}
        if field[1] not in named and field[1] in trained_fields(vllm_config.model_config.hf_config):
            return f"config.json: {TRAINED}: {str(error).removeprefix('dlm.selection.')}"
    return f"--dlm-config: {error}"


def warn_of_unused_fields(vllm_config) -> None:
    """Logs a warning if the checkpoint was trained with a selection and the server names none."""
    if "selection" in (written_object(vllm_config) or {}):
        return
    if trained_fields(vllm_config.model_config.hf_config):
        logger.warning_once(
            "config.json: unique: the checkpoint was trained with this selection but is served without it; "
            """enable it with --dlm-config '{"selection": {"name": "unique"}}'"""
        )


def register_models() -> None:
    from transformers import AutoConfig, AutoTokenizer
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.config import _CONFIG_REGISTRY
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    from vllm_dlm.families.config import CheckedConvertor

    # Import first, so that an import error leaves nothing registered.
    configs = {architecture: imported(family.config) for architecture, family in FAMILIES.items()}
    taken = taken_model_types()
    for model_type in sorted(taken):
        warn_once(
            f"vllm_dlm {__version__} does not serve models of type {model_type!r}, which vLLM or another plugin has "
            "already registered; VLLM_PLUGINS=vllm_dlm starts vLLM without other plugins"
        )
    LEFT.update(architecture for architecture, family in FAMILIES.items() if family.model_type in taken)
    configs = {architecture: config for architecture, config in configs.items() if architecture not in LEFT}
    # Families with the same model_type share one class, which selects the family by config.json.
    for config in {config.model_type: config for config in reversed(configs.values())}.values():
        _CONFIG_REGISTRY[config.model_type] = config
        MODEL_ARCH_CONFIG_CONVERTORS[config.model_type] = CheckedConvertor
        AutoConfig.register(config.model_type, config, exist_ok=True)
    for architecture, config in configs.items():
        family = FAMILIES[architecture]
        if family.tokenizer is not None:
            AutoTokenizer.register(config, imported(family.tokenizer), exist_ok=True)
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, family.model)
        MODELS_CONFIG_MAP[architecture] = DiffusionConfigHook


def taken_model_types() -> set[str]:
    """Model types of FAMILIES that vLLM or another plugin has registered"""
    from transformers import CONFIG_MAPPING
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from vllm_dlm.families.config import DiffusionConfig

    def own(config) -> bool:
        return isinstance(config, type) and issubclass(config, DiffusionConfig)

    def taken(architecture: str, model_type: str) -> bool:
        if architecture in ModelRegistry.get_supported_archs():
            return MODELS_CONFIG_MAP.get(architecture) is not DiffusionConfigHook
        # Classes of transformers itself do not count, because nothing serves them as diffusion models.
        registered = [known.get(model_type) for known in (_CONFIG_REGISTRY, CONFIG_MAPPING._extra_content)]
        return any(config is not None and not own(config) for config in registered)

    return {family.model_type for architecture, family in FAMILIES.items() if taken(architecture, family.model_type)}


class DiffusionConfigHook:
    """Called by vLLM in the front-end, before engine and workers get the pickled configuration."""

    @staticmethod
    def verify_and_update_model_config(model_config) -> None:
        """A no-op, because `CheckedConvertor` has already checked config.json."""

    @staticmethod
    def verify_and_update_config(vllm_config) -> None:
        from vllm.config import CompilationMode, CUDAGraphMode
        from vllm.platforms import current_platform

        from vllm_dlm.models.files import refuse_unreadable
        from vllm_dlm.models.tokens import token_id

        model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
        refuse_unsupported(vllm_config)
        family = record_of(model)
        if model.original_max_model_len is None and (family.context or model.max_model_len) < model.max_model_len:
            logger.info_once(
                "max_model_len: %d, the length for which %s was trained; its config.json allows %d (--max-model-len)",
                family.context,
                model.architecture,
                model.max_model_len,
            )
            model.max_model_len = family.context
        if family.with_block_size and family.attention == "full":
            logger.info_once(
                "%s: config.json does not say which attention the model was trained with, so full attention is used. "
                "For a block-causal model, set the width of its blocks: --hf-overrides "
                """'{"block_size": 32}'""",
                model.architecture,
            )
        if vllm_config.load_config.load_format != "dummy":
            refuse_unreadable(model.architecture, model.model)
        try:
            options = resolved_options(vllm_config)
            set_block_size(vllm_config.cache_config, options.selection)
        except OptionError as error:
            raise ValueError(blamed(vllm_config, error)) from None

        if not options.selection.sparse:
            warn_of_unused_fields(vllm_config)

        device = "cpu" if current_platform.is_cpu() else "cuda"
        if vllm_config.parallel_config.worker_cls == "auto":
            vllm_config.parallel_config.worker_cls = WORKERS[device]
        if scheduler.scheduler_cls is None:
            scheduler.scheduler_cls = "vllm_dlm.integration.scheduler.scheduler.DenoisingScheduler"
        # The plan of a canvas determines the rows of each step, and each step needs the tokens of the previous one.
        scheduler.async_scheduling = False
        scheduler.enable_chunked_prefill = False
        if not shares_prefixes(vllm_config, options):
            vllm_config.cache_config.enable_prefix_caching = False
        longest = model.max_model_len if family.attention == "full" else min(model.max_model_len, 2 * CHUNK)
        scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, longest)
        vllm_config.compilation_config.mode = CompilationMode.NONE
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE

        if getattr(model.hf_config, "eot_token_id", None) is None:
            model.hf_config.eot_token_id = token_id(family.end_of_turn, model.tokenizer, model.tokenizer_revision)
        # The published code decodes greedily by default; vLLM's default is temperature 1.
        if "temperature" not in model.get_diff_sampling_param():
            model.override_generation_config.setdefault("temperature", 0.0)
        model.dlm_options = options  # see server_options_of


def shares_prefixes(vllm_config, options) -> bool:
    """Whether the text up to the end of a KV block determines its content, because no canvas block extends beyond
    it."""
    if options.attention == "full":
        return False  # see cli.py
    size, width = vllm_config.cache_config.block_size, options.decoding.block_length
    whole = size % width == 0
    if not whole and getattr(vllm_config.model_config, "dlm_prefixes_wanted", False):
        raise ValueError(
            f"enable_prefix_caching: block_size must be a multiple of the canvas block length, {width}, not {size}; "
            "start without it"
        )
    return whole


def set_block_size(cache_config, selection) -> None:
    """KV blocks must hold whole units of the selection. Blocks of 128, the default on CPUs, do so for all
    selections."""
    if not cache_config.user_specified_block_size:
        cache_config.block_size, cache_config.user_specified_block_size = 128, True
    elif selection.sparse and cache_config.block_size % selection.unit:
        raise OptionError(
            "block_size",
            f"block_size: {cache_config.block_size} is not a multiple of the {selection.unit} tokens that "
            f"dlm.selection {selection.name!r} reads together",
        )


def refuse_unsupported(vllm_config) -> None:
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    refused = {
        "enable_lora": vllm_config.lora_config is not None,
        "speculative_config": vllm_config.speculative_config is not None,
        "kv_transfer_config": vllm_config.kv_transfer_config is not None,
        "pipeline_parallel_size": parallel.pipeline_parallel_size > 1,
        "decode_context_parallel_size": parallel.decode_context_parallel_size > 1,
        "enable_dbo": parallel.enable_dbo,
        "kv_cache_dtype": vllm_config.cache_config.cache_dtype not in ("auto", "float16", "bfloat16", "float32"),
        "enable_sleep_mode": model.enable_sleep_mode,
        "logits_processors": bool(model.logits_processors),
        "logprobs_mode": model.logprobs_mode != "raw_logprobs",
        "return_sampling_mask": model.return_sampling_mask,
        "runner": model.runner_type != "generate",
        # for vLLM's own diffusion models; this plugin's models use --dlm-config
        "diffusion_config": vllm_config.diffusion_config is not None,
        "watermark_config": vllm_config.watermark_config is not None,
    }
    for field, wrong in refused.items():
        if wrong:
            raise ValueError(f"{field}: not supported with masked-diffusion language models; start without it")
