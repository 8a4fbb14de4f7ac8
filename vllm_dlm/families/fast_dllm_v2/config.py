"""Config class for Fast-dLLM v2 checkpoints from the hub: Qwen2's fields, and `bd_size`, the width of a block."""

from collections.abc import Iterator

from vllm_dlm.families.config import PlainRopeConfig, is_whole
from vllm_dlm.families.fast_dllm_v2 import FAMILY


class FastDLLMv2Config(PlainRopeConfig):
    family = FAMILY
    model_type = FAMILY.model_type
    usual_mask = 151665
    attribute_map = {"block_size": "bd_size"}

    def __init__(self, mask_token_id=None, bd_size=32, **kwargs):
        super().__init__(**kwargs)
        self.mask_token_id, self.bd_size = mask_token_id, bd_size

    implemented = {"hidden_act": "silu", "use_sliding_window": False, "rope_type": "default"}

    def own_fields(self) -> Iterator[tuple[str, bool, str]]:
        yield "bd_size", is_whole(self.bd_size) and self.bd_size > 0, "a whole number above 0"
