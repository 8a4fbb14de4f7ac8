"""The hub's config.json and tokenizer files of Dream."""

from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from vllm_dlm.families.config import DiffusionConfig
from vllm_dlm.families.dream import FAMILY


class DreamConfig(DiffusionConfig):
    family = FAMILY
    model_type = FAMILY.model_type

    def __init__(self, rope_scaling=None, tie_word_embeddings=False, **kwargs):
        super().__init__(**kwargs)
        self.tie_word_embeddings = tie_word_embeddings
        # Kept from transformers, which would turn it and rope_theta into something else before it is checked.
        self.rope_scaling = rope_scaling if isinstance(rope_scaling, dict | None) else {"rope_type": rope_scaling}

    @property
    def rope_type(self) -> str | None:
        scaling = self.rope_scaling or {}
        return scaling.get("rope_type", scaling.get("type", "default"))

    implemented = {
        "hidden_act": "silu",
        "use_sliding_window": False,
        "rope_type": "default",
        "use_mrope": False,
    }


class DreamTokenizer(Qwen2Tokenizer):
    """Dream ships vocab.json and merges.txt for a class of this name in its repository, which is Qwen2's."""
