"""Config class for A2D checkpoints over Qwen3: Qwen3's fields, and `block_size` if the operator adds it."""

from collections.abc import Iterator

from vllm_dlm.families.a2d_qwen3 import FAMILY
from vllm_dlm.families.config import PlainRopeConfig, is_whole


class A2DQwen3Config(PlainRopeConfig):
    family = FAMILY
    model_type = FAMILY.model_type
    usual_mask = 151669

    def __init__(self, mask_token_id=None, block_size=None, **kwargs):
        super().__init__(**kwargs)
        self.mask_token_id, self.block_size = mask_token_id, block_size

    implemented = {
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "rope_type": "default",
    }

    def own_fields(self) -> Iterator[tuple[str, bool, str]]:
        width = self.block_size
        yield "block_size", width is None or (is_whole(width) and width > 0), "a whole number above 0, or left out"
