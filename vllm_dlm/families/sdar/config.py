"""Config class for SDAR checkpoints from the hub: Qwen3's fields and `block_size`."""

from collections.abc import Iterator

from vllm_dlm.families.config import PlainRopeConfig, is_whole
from vllm_dlm.families.sdar import FAMILY


class SDARConfig(PlainRopeConfig):
    family = FAMILY
    model_type = FAMILY.model_type

    def __init__(self, block_size=None, **kwargs):
        super().__init__(**kwargs)
        self.block_size = block_size

    implemented = {
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "rope_type": "default",
        "use_regular_causal": False,
    }

    def own_fields(self) -> Iterator[tuple[str, bool, str]]:
        yield "block_size", is_whole(self.block_size) and self.block_size > 0, "a whole number above 0"
