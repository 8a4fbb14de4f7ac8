"""The hub's config.json and tokenizer files of LLaDA and Dream without trust_remote_code.

Read in vLLM 0.32: transformers_utils/config.py (`_CONFIG_REGISTRY`),
transformers_utils/model_arch_config_convertor.py (the first to read a config,
after `--hf-overrides` and before anything is computed from it).
"""

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from vllm_dlm.models.files import refuse_unreadable


class DiffusionConfig(PretrainedConfig):
    """Takes what transformers' own checks would answer with a bare Python error, for `check_config` to name."""

    def __init__(self, vocab_size=None, dtype=None, torch_dtype=None, **kwargs):
        dtype = torch_dtype if dtype is None else dtype
        known = not isinstance(dtype, str) or isinstance(getattr(torch, dtype, None), torch.dtype)
        super().__init__(dtype=dtype if known else None, **kwargs)
        self.dtype = self.dtype if known else dtype
        self.vocab_size = vocab_size

    def validate_rope(self) -> None:
        """Another than the plain rotary embedding is refused whatever its details."""

    @property
    def vocab_field(self) -> str:
        """Where config.json has the vocabulary's size."""
        return "vocab_size"


class LLaDAConfig(DiffusionConfig):
    """LLaDA spells Llama's fields in OLMo's words; the attribute map gives both names."""

    model_type = "llada"
    architecture = "LLaDAModelLM"
    logits_shift = 0  # logits at position i predict the token at i + shift
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
    }

    def __init__(
        self, n_heads=None, n_kv_heads=None, embedding_size=None, vocab_size=None, weight_tying=False, **kwargs
    ):
        # The embedding may be padded beyond the vocabulary; the head has the same rows.
        self.embedding_size = embedding_size
        super().__init__(vocab_size=embedding_size or vocab_size, **kwargs)
        self.n_heads, self.n_kv_heads = n_heads, n_heads if n_kv_heads is None else n_kv_heads
        self.weight_tying = weight_tying

    @property
    def vocab_field(self) -> str:
        return "embedding_size" if self.embedding_size else "vocab_size"

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
    width, heads, kv_heads = "d_model", "n_heads", "n_kv_heads"
    sizes = (width, "n_layers", heads, kv_heads, "mlp_hidden_size", "max_sequence_length")
    tied = "weight_tying"


class DreamConfig(DiffusionConfig):
    model_type = "Dream"
    architecture = "DreamModel"
    logits_shift = 1

    def __init__(self, rope_scaling=None, tie_word_embeddings=False, **kwargs):
        super().__init__(**kwargs)
        self.tie_word_embeddings = tie_word_embeddings
        # Kept from transformers, which would turn it and rope_theta into something else before it is checked.
        self.rope_scaling = rope_scaling if isinstance(rope_scaling, dict | None) else {"rope_type": rope_scaling}

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
    width, heads, kv_heads = "hidden_size", "num_attention_heads", "num_key_value_heads"
    sizes = (width, "num_hidden_layers", heads, kv_heads, "intermediate_size", "max_position_embeddings")
    tied = "tie_word_embeddings"


class DreamTokenizer(Qwen2Tokenizer):
    """Dream ships vocab.json and merges.txt for a class of this name in its repository, which is Qwen2's."""


class CheckedConvertor(ModelArchConfigConvertorBase):
    """vLLM's reader of a config, which would answer wrong fields with bare Python errors."""

    def __init__(self, hf_config, *args, **kwargs):
        check_config(hf_config)
        if hf_config.dtype is None:  # vLLM looks for it in the files
            refuse_unreadable(hf_config.architecture, hf_config.name_or_path)
        super().__init__(hf_config, *args, **kwargs)


def check_config(config) -> None:
    """One clear line for a checkpoint this code would run wrongly or not at all."""
    for field, right, wanted in _fields(config):
        value = getattr(config, field, None)
        if not right:
            wrong = f"{field}={value!r} in config.json is not valid, it must be {wanted}"
            missing = f"config.json has no {field}, which this model needs: {wanted}"
            raise ValueError(f"{config.architecture}: {missing if value is None else wrong}")
    for field, wanted in config.implemented.items():
        value = getattr(config, field, wanted)
        if value != wanted and not (wanted is None and not value):
            raise ValueError(
                f"{config.architecture}: {field}={value!r} in config.json is not supported, only {wanted!r} is"
            )


def _fields(config) -> Iterator[tuple[str, bool, str]]:
    """Every field that is used: name, whether its value is right, what would be. Later ones rely on earlier ones."""

    def value(field: str) -> Any:
        return getattr(config, field, None)

    names = value("architectures")
    yield "architectures", isinstance(names, list) and config.architecture in names, f"[{config.architecture!r}]"
    for field in (*config.sizes, config.vocab_field):
        yield field, _whole(value(field)) and value(field) > 0, "a whole number above 0"

    width, heads = value(config.width), value(config.heads)
    # Rotary embedding turns pairs of channels.
    even = width % (2 * heads) == 0
    yield config.heads, even, f"a number that divides {config.width}={width} into heads of even width"
    divides = heads % value(config.kv_heads) == 0
    yield config.kv_heads, divides, f"a number that divides {config.heads}={heads}"
    for field in ("rope_theta", "rms_norm_eps"):
        yield field, _number(value(field)) and 0 < value(field) < math.inf, "a number above 0"

    optional = [] if value("eot_token_id") is None else ["eot_token_id"]
    for field in ("mask_token_id", "eos_token_id", *optional):
        inside = _whole(value(field)) and 0 <= value(field) < config.vocab_size
        yield field, inside, f"a whole number at least 0 and below {config.vocab_field}={config.vocab_size}"
    yield config.tied, value(config.tied) in (True, False, None), "true or false"
    dtype = isinstance(value("dtype"), torch.dtype | None)
    yield "dtype", dtype, "the name of a dtype of torch, such as 'bfloat16'"
    yield "unique", isinstance(value("unique"), dict | None), "an object with the fields of that selection"


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return _whole(value) or isinstance(value, float)


def trained_selection(config) -> dict | None:
    """What a checkpoint trained by `vllm_dlm.training` wants of a server that names no selection: an option object."""
    from vllm_dlm.plugins.selection.unique import Unique

    given = getattr(config.get_text_config(), "unique", None)
    if not isinstance(given, dict):
        return None
    known = {field.name for field in fields(Unique)}  # the rest is about training
    return {"name": Unique.name} | {name: value for name, value in given.items() if name in known}
