"""The hub's config.json and tokenizer files of LLaDA and Dream without trust_remote_code.

Read in vLLM 0.32: transformers_utils/config.py (`_CONFIG_REGISTRY`).
"""

from transformers import PretrainedConfig
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer


class LLaDAConfig(PretrainedConfig):
    """LLaDA spells Llama's fields in OLMo's words; the attribute map gives both names."""

    model_type = "llada"
    logits_shift = 0  # logits at position i predict the token at i + shift
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    def __init__(self, n_kv_heads=None, embedding_size=None, vocab_size=0, weight_tying=False, **kwargs):
        self.n_heads = kwargs.get("n_heads")
        self.n_kv_heads = n_kv_heads or self.n_heads
        # The embedding may be padded beyond the vocabulary; the head has the same rows.
        self.vocab_size = embedding_size or vocab_size
        kwargs["tie_word_embeddings"] = weight_tying
        super().__init__(**kwargs)

    #: field -> the one value the architecture is implemented for
    implemented = {
        "block_type": "llama",
        "rope": True,
        "alibi": False,
        "layer_norm_type": "rms",
        "activation_type": "silu",
        "attention_layer_norm": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "bias_for_layer_norm": False,
        "input_emb_norm": False,
        "scale_logits": False,
        "block_group_size": 1,
        "rope_full_precision": True,
        "layer_norm_with_affine": True,
        "multi_query_attention": None,
        "clip_qkv": None,
    }
    required = ("d_model", "n_layers", "n_heads", "mlp_hidden_size", "max_sequence_length", "rope_theta")


class DreamConfig(PretrainedConfig):
    model_type = "Dream"
    logits_shift = 1

    def __init__(self, rope_scaling=None, **kwargs):
        super().__init__(**kwargs)
        # Kept from transformers, which would turn it and rope_theta into something else before it is checked.
        self.rope_scaling = rope_scaling

    @property
    def rope_type(self) -> str:
        scaling = self.rope_scaling or {}
        return scaling.get("rope_type", scaling.get("type", "default"))

    implemented = {
        "hidden_act": "silu",
        "use_sliding_window": False,
        "rope_type": "default",
        "use_mrope": False,
    }
    required = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
                "max_position_embeddings", "rope_theta")


class DreamTokenizer(Qwen2Tokenizer):
    """Dream ships vocab.json and merges.txt for a class of this name in its repository, which is Qwen2's."""


def trained_selection(config) -> dict | None:
    """What a checkpoint trained by `vllm_dlm.training` wants of a server that names no selection: an option object."""
    from dataclasses import fields

    from vllm_dlm.plugins.selection.unique import Unique

    given = getattr(config.get_text_config(), "unique", None)
    if not isinstance(given, dict):
        return None
    known = {field.name for field in fields(Unique)}  # the rest is about training
    return {"name": Unique.name} | {name: value for name, value in given.items() if name in known}


def check_config(config) -> None:
    """One clear line for a checkpoint this code would run wrongly."""
    name = (config.architectures or [config.model_type])[0]
    for field in (*config.required, "mask_token_id", "eos_token_id"):
        if getattr(config, field, None) is None:
            raise ValueError(f"{name}: config.json has no {field}, which this model needs")
    for field, wanted in config.implemented.items():
        value = getattr(config, field, wanted)
        if value != wanted and not (wanted is None and not value):
            raise ValueError(f"{name}: {field}={value!r} in config.json is not supported, only {wanted!r} is")
    if not 0 <= config.mask_token_id < config.vocab_size:
        raise ValueError(
            f"{name}: mask_token_id={config.mask_token_id} in config.json is outside the vocabulary "
            f"of {config.vocab_size}"
        )
    if config.hidden_size % config.num_attention_heads or config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"{name}: {config.hidden_size} channels, {config.num_attention_heads} heads and "
            f"{config.num_key_value_heads} key/value heads in config.json do not divide"
        )
