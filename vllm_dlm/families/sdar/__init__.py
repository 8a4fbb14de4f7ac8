"""SDAR: 1.7B, 4B, 8B Chat, TraDo (https://arxiv.org/abs/2510.06303)."""

from vllm_dlm.families.family import Family

FAMILY = Family(
    architecture="SDARForCausalLM",
    model_type="sdar",
    model="vllm_dlm.families.sdar.model:SDARForCausalLM",
    config="vllm_dlm.families.sdar.config:SDARConfig",
    decoding="low_confidence_static",
    end_of_turn="<|im_end|>",
    presets={"serve": {"decoding": {"name": "low_confidence_dynamic"}}},
    attention="block_causal",
    qk_norm=True,
)
