"""LLaDA2.0 and LLaDA2.1: mini 16B-A1B, flash 100B-A6B (https://arxiv.org/abs/2512.15745)."""

from vllm_dlm.families.family import Family

FAMILY = Family(
    architecture="LLaDA2MoeModelLM",
    model_type="llada2_moe",
    model="vllm_dlm.families.llada2.model:LLaDA2MoeModelLM",
    config="vllm_dlm.families.llada2.config:LLaDA2Config",
    decoding="low_confidence_dynamic/llada2",
    end_of_turn="<|role_end|>",
    presets={
        "serve": {"decoding": {"name": "low_confidence_dynamic/llada2"}},
        "llada2.1": {"decoding": {"name": "token_editing/quality"}},
        "llada2.1-speed": {"decoding": {"name": "token_editing/speed"}},
    },
    attention="block_causal",
    qk_norm=True,
)
