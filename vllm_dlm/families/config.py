"""Base classes and checks for the config.json of all families, without trust_remote_code.

Read in vLLM 0.32 and 0.33: transformers_utils/config.py (`_CONFIG_REGISTRY`),
transformers_utils/model_arch_config_convertor.py (the first code that reads a
config, after `--hf-overrides` and before anything is derived from it).
"""

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from transformers import PretrainedConfig
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from vllm_dlm.families import FAMILIES
from vllm_dlm.families.family import imported
from vllm_dlm.models.files import refuse_unreadable
from vllm_dlm.models.tokens import mask_token_id


class DiffusionConfig(PretrainedConfig):
    """Accepts values that transformers would reject with a bare Python error, so that `check_config` can name them.

    Subclasses set `family`, and the names of the fields in their config.json if these differ from Llama's.
    """

    width, heads, kv_heads = "hidden_size", "num_attention_heads", "num_key_value_heads"
    sizes: ClassVar[tuple[str, ...]] = (
        width,
        "num_hidden_layers",
        heads,
        kv_heads,
        "intermediate_size",
        "max_position_embeddings",
    )
    tied = "tie_word_embeddings"
    #: mask token of the published checkpoints, used if neither config.json nor the tokenizer files have one
    usual_mask: ClassVar[int | None] = None
    #: field -> the only value that is implemented
    implemented: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, **kwargs):
        """Makes a subclass without an `__init__` inherit it. Otherwise transformers would generate one from its
        fields."""
        if "__init__" not in cls.__dict__:
            cls.__init__ = lambda self, **fields: super(cls, self).__init__(**fields)  # type: ignore[method-assign]
        super().__init_subclass__(**kwargs)

    def __init__(self, vocab_size=None, dtype=None, torch_dtype=None, head_dim=None, layer_types=None, **kwargs):
        dtype = torch_dtype if dtype is None else dtype
        known = not isinstance(dtype, str) or isinstance(getattr(torch, dtype, None), torch.dtype)
        super().__init__(dtype=dtype if known else None, **kwargs)
        if not known:
            self.dtype = dtype
        self.vocab_size = vocab_size
        self.head_dim = head_dim  # if missing, derived once width and heads are checked
        self.logits_shift = self.family.logits_shift
        self.layer_types = layer_types  # not passed on: transformers would compare their number before it is checked

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Builds the config class of the architecture in `architectures`, since families may share a model_type."""
        named = config_dict.get("architectures")
        own = [family for name, family in FAMILIES.items() if isinstance(named, list) and name in named]
        config = imported(own[0].config) if own else cls
        return super().from_dict(config_dict, **kwargs) if config is cls else config.from_dict(config_dict, **kwargs)

    def validate_rope(self) -> None:
        """Skips transformers' check: any rotary embedding other than the plain one is rejected anyway."""

    def own_fields(self) -> Iterator[tuple[str, bool, str]]:
        """Checks of fields specific to this family, in the format of `_fields`."""
        return iter(())

    @property
    def vocab_field(self) -> str:
        """Name of the field in config.json that holds the vocabulary size."""
        return "vocab_size"


class PlainRopeConfig(DiffusionConfig):
    """Base class for families whose config.json has `rope_scaling` and `tie_word_embeddings` as in transformers."""

    def __init__(self, rope_scaling=None, tie_word_embeddings=False, **kwargs):
        super().__init__(**kwargs)
        self.tie_word_embeddings = tie_word_embeddings
        # Not passed on, because transformers would convert it and rope_theta before they are checked.
        self.rope_scaling = rope_scaling if isinstance(rope_scaling, dict | None) else {"rope_type": rope_scaling}

    @property
    def rope_type(self) -> str | None:
        scaling = self.rope_scaling or {}
        return scaling.get("rope_type", scaling.get("type", "default"))


class CheckedConvertor(ModelArchConfigConvertorBase):
    """vLLM's config convertor with checks first, since it would answer invalid fields with bare Python errors."""

    def __init__(self, hf_config, *args, **kwargs):
        if hf_config.usual_mask is not None and getattr(hf_config, "mask_token_id", None) is None:
            found = mask_token_id(hf_config.name_or_path, kwargs.get("revision"))
            hf_config.mask_token_id = hf_config.usual_mask if found is None else found
        check_config(hf_config)
        if hf_config.dtype is None:  # vLLM would look for it in the weight files
            refuse_unreadable(hf_config.family.architecture, hf_config.name_or_path)
        if hf_config.head_dim is None:
            hf_config.head_dim = hf_config.hidden_size // hf_config.num_attention_heads
        super().__init__(hf_config, *args, **kwargs)

    def get_num_experts(self) -> int:
        """0, so that vLLM does not synchronize the steps of data-parallel replicas, which do not share experts."""
        return 0


def check_config(config) -> None:
    """Raises an error in one line for a checkpoint that would run incorrectly or not at all."""
    architecture = config.family.architecture
    for field, right, wanted in _fields(config):
        value = getattr(config, field, None)
        if not right:
            wrong = f"{field}={value!r} in config.json is not valid, it must be {wanted}"
            missing = f"config.json has no {field}, which this model needs: {wanted}"
            raise ValueError(f"{architecture}: {missing if value is None else wrong}")
    for field, wanted in config.implemented.items():
        value = getattr(config, field, wanted)
        if value != wanted and not (wanted is None and not value):
            raise ValueError(f"{architecture}: {field}={value!r} in config.json is not supported, only {wanted!r} is")


def _fields(config) -> Iterator[tuple[str, bool, str]]:
    """Yields (name, whether the value is valid, description of valid values) for every field that is used.

    Later checks rely on earlier ones, so the first invalid field must stop the iteration."""

    def value(field: str) -> Any:
        return getattr(config, field, None)

    names, architecture = value("architectures"), config.family.architecture
    known = isinstance(names, list) and not set(config.family.architectures).isdisjoint(map(str, names))
    yield "architectures", known, f"[{architecture!r}]"
    for field in (*config.sizes, config.vocab_field):
        yield field, is_whole(value(field)) and value(field) > 0, "a whole number above 0"

    width, heads = value(config.width), value(config.heads)
    # Rotary embedding rotates pairs of channels.
    if (head_dim := value("head_dim")) is None:
        even = width % (2 * heads) == 0
        yield config.heads, even, f"a number that divides {config.width}={width} into heads of even width"
    else:
        even = is_whole(head_dim) and head_dim > 0 and head_dim % 2 == 0
        yield "head_dim", even, "an even whole number above 0"
    divides = heads % value(config.kv_heads) == 0
    yield config.kv_heads, divides, f"a number that divides {config.heads}={heads}"
    for field in ("rope_theta", "rms_norm_eps"):
        yield field, is_number(value(field)) and 0 < value(field) < math.inf, "a number above 0"

    optional = [] if value("eot_token_id") is None else ["eot_token_id"]
    for field in ("mask_token_id", "eos_token_id", *optional):
        inside = is_whole(value(field)) and 0 <= value(field) < config.vocab_size
        yield field, inside, f"a whole number at least 0 and below {config.vocab_field}={config.vocab_size}"
    yield config.tied, value(config.tied) in (True, False, None), "true or false"
    dtype = isinstance(value("dtype"), torch.dtype | None)
    yield "dtype", dtype, "the name of a dtype of torch, such as 'bfloat16'"
    kinds = value("layer_types")
    alike = kinds is None or (isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds))
    yield "layer_types", alike, "'full_attention' for every layer, or left out"
    yield "unique", isinstance(value("unique"), dict | None), "an object with the fields of that selection"
    yield from config.own_fields()


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return is_whole(value) or isinstance(value, float)
