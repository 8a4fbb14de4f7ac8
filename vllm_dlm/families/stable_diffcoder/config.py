"""Config class for Stable-DiffCoder checkpoints: Llama's fields. Other values are in tokenizer and code."""

from collections.abc import Iterator

from vllm_dlm.families.config import PlainRopeConfig, is_whole
from vllm_dlm.families.stable_diffcoder import FAMILY


class StableDiffcoderConfig(PlainRopeConfig):
    family = FAMILY
    model_type = FAMILY.model_type
    usual_mask = 5

    def __init__(self, mask_token_id=None, block_size=4, **kwargs):
        super().__init__(**kwargs)
        self.mask_token_id, self.block_size = mask_token_id, block_size

    implemented = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_type": "default",
    }

    def own_fields(self) -> Iterator[tuple[str, bool, str]]:
        yield "block_size", is_whole(self.block_size) and self.block_size > 0, "a whole number above 0"
