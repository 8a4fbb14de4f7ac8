"""The hub's config.json of SDAR: Qwen3's, and how wide a block is."""

from collections.abc import Iterator

from vllm_dlm.families.config import DiffusionConfig, is_whole
from vllm_dlm.families.sdar import FAMILY


class SDARConfig(DiffusionConfig):
    family = FAMILY
    model_type = FAMILY.model_type

    def __init__(self, block_size=None, rope_scaling=None, tie_word_embeddings=False, **kwargs):
        super().__init__(**kwargs)
        self.block_size = block_size
        self.tie_word_embeddings = tie_word_embeddings
        # Kept from transformers, which would turn it and rope_theta into something else before it is checked.
        self.rope_scaling = rope_scaling if isinstance(rope_scaling, dict | None) else {"rope_type": rope_scaling}

    @property
    def rope_type(self) -> str | None:
        scaling = self.rope_scaling or {}
        return scaling.get("rope_type", scaling.get("type", "default"))

    implemented = {
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "rope_type": "default",
        "use_regular_causal": False,
    }

    def own_fields(self) -> Iterator[tuple[str, bool, str]]:
        yield "block_size", is_whole(self.block_size) and self.block_size > 0, "a whole number above 0"
