"""A2D over Qwen2: Qwen2.5-Coder-0.5B of dLLM (https://github.com/ZHZisZZ/dllm)."""

from dataclasses import replace

from vllm_dlm.families.a2d_qwen3 import FAMILY as QWEN3

FAMILY = replace(
    QWEN3,
    architecture="A2DQwen2LMHeadModel",
    model_type="a2d-qwen2",
    model="vllm_dlm.families.dream.model:DreamModel",
    config="vllm_dlm.families.a2d_qwen2.config:A2DQwen2Config",
    qk_norm=False,
    qkv_bias=True,
    template_kwargs={},
)
