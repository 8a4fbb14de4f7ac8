"""Config class for RND1 checkpoints from the hub: Qwen3-MoE's fields and `mask_token_id`."""

from vllm_dlm.families.rnd1 import FAMILY
from vllm_dlm.families.sdar_moe.config import Qwen3MoeConfig


class RND1Config(Qwen3MoeConfig):
    family = FAMILY
    model_type = FAMILY.model_type
    implemented = Qwen3MoeConfig.implemented | {"is_causal": False, "sliding_window": None}

    def __init__(self, rope_scaling=None, **kwargs):
        super().__init__(rope_scaling=rope_scaling or None, **kwargs)  # config.json has false
