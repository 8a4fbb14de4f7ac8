"""Properties of the served model that requests are checked against, read from vLLM's input processor.

The checks access vLLM only through this module. Read in vLLM 0.32 and 0.33: v1/engine/input_processor.py,
config/model.py (`get_diff_sampling_param`), renderers/base.py (`_executor`), v1/engine/core_client.py
(`_apply_ready_response`, `engine_ranks_managed`).
"""

from functools import cached_property
from typing import Any

from vllm_dlm.cache.budget import BlockShape
from vllm_dlm.configuration import server_options_of
from vllm_dlm.families import record_of
from vllm_dlm.options import Options


class ServedModel:
    def __init__(self, processor: Any):
        self.processor = processor
        self.config, self.hf_config = processor.model_config, processor.model_config.hf_config

    @property
    def options(self) -> Options:
        """The server's"""
        return server_options_of(self.config)

    @property
    def max_model_len(self) -> int:
        return self.config.max_model_len

    @property
    def mask_id(self) -> int:
        return self.hf_config.mask_token_id

    @property
    def vocabulary_size(self) -> int:
        return self.config.get_vocab_size()

    @property
    def tokenizer(self) -> Any | None:
        return self.processor.tokenizer

    @property
    def characters_per_token(self) -> int:
        """Maximum number of characters of a token"""
        return getattr(self.tokenizer, "max_chars_per_token", None) or 1 << 7

    @property
    def tokenizer_threads(self) -> Any | None:
        """vLLM's executor for tokenisation"""
        return getattr(self.processor.renderer, "_executor", None)

    @cached_property
    def default_length(self) -> int:
        """Response length of a request without `max_tokens` on a canvas that does not grow"""
        return default_length(self.config, self.config.get_diff_sampling_param())

    def end_tokens(self) -> list[int]:
        """End of sequence, end of turn, and other tokens with which the checkpoint ends an answer. vLLM's end token
        comes first."""
        listed = self.processor.generation_config_fields.get("eos_token_id") or []
        own = getattr(self.processor.get_tokenizer(), "eos_token_id", None)
        listed = [listed] if isinstance(listed, int) else listed
        found = [own, self.hf_config.eos_token_id, getattr(self.hf_config, "eot_token_id", None), *listed]
        return list(dict.fromkeys(token for token in found if token is not None))

    # -- the KV cache ----------------------------------------------------------------------

    @property
    def block_size(self) -> int:
        return self.processor.cache_config.block_size

    @property
    def block_shape(self) -> BlockShape:
        return BlockShape.of(self.processor.vllm_config)

    @property
    def replica_blocks(self) -> int | None:
        """KV blocks of one replica, which must hold a canvas; None: not known yet. The front-end gets the sum over all
        engines from vLLM."""
        total, parallel = self.processor.cache_config.num_gpu_blocks, self.processor.vllm_config.parallel_config
        if parallel.data_parallel_rank_local is not None:
            replicas = 1  # one process of `LLM` for each replica
        elif parallel.local_engines_only:
            replicas = parallel.data_parallel_size_local
        else:
            replicas = parallel.data_parallel_size
        return None if total is None else total // replicas


def served_model(processor: Any) -> ServedModel:
    """The instance of an input processor"""
    if not hasattr(processor, "dlm_model"):
        processor.dlm_model = ServedModel(processor)
    return processor.dlm_model


def default_length(model_config: Any, sampling_defaults: dict[str, Any]) -> int:
    """The first of: the server's default canvas, the one in the checkpoint's generation_config.json, the family's. If
    canvases grow as needed, the model's length."""
    usual = sampling_defaults.get("max_tokens", record_of(model_config).canvas)
    options = server_options_of(model_config)
    return options.canvas.length(model_config.max_model_len if options.grows else usual)
