"""Config class for A2D checkpoints over Qwen2: Qwen2's fields, and `block_size` if the operator adds it."""

from vllm_dlm.families.a2d_qwen2 import FAMILY
from vllm_dlm.families.a2d_qwen3.config import A2DQwen3Config


class A2DQwen2Config(A2DQwen3Config):
    family = FAMILY
    model_type = FAMILY.model_type
    usual_mask = 151665
    implemented = {"hidden_act": "silu", "use_sliding_window": False, "rope_type": "default"}
