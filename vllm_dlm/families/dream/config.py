"""The hub's config.json and tokenizer files of Dream."""

from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from vllm_dlm.families.config import PlainRopeConfig
from vllm_dlm.families.dream import FAMILY


class DreamConfig(PlainRopeConfig):
    family = FAMILY
    model_type = FAMILY.model_type

    implemented = {
        "hidden_act": "silu",
        "use_sliding_window": False,
        "rope_type": "default",
        "use_mrope": False,
    }


class DreamTokenizer(Qwen2Tokenizer):
    """Dream ships vocab.json and merges.txt for a class of this name in its repository, which is Qwen2's."""
