"""Config class for A2D checkpoints over Llama: Llama's fields, and `block_size` if the operator adds it."""

from vllm_dlm.families.a2d_llama import FAMILY
from vllm_dlm.families.a2d_qwen3.config import A2DQwen3Config


class A2DLlamaConfig(A2DQwen3Config):
    family = FAMILY
    model_type = FAMILY.model_type
    usual_mask = 128256  # the first token added to Llama 3's tokenizer
    implemented = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_type": "default"}
