"""Fast-dLLM v2: 1.5B, 7B (https://arxiv.org/abs/2509.26328)."""

from vllm_dlm.families.family import Family

FAMILY = Family(
    architecture="Fast_dLLM_QwenForCausalLM",
    model_type="Fast_dLLM_Qwen",
    model="vllm_dlm.families.dream.model:DreamModel",
    config="vllm_dlm.families.fast_dllm_v2.config:FastDLLMv2Config",
    decoding="sub_blocks",
    end_of_turn="<|im_end|>",
    presets={"serve": {"decoding": {"name": "sub_blocks", "threshold": 0.9}}},
    logits_shift=1,
    attention="block_causal",
    qkv_bias=True,
)
