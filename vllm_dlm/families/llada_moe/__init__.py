"""LLaDA-MoE: 7B-A1B Base, Instruct (https://arxiv.org/abs/2509.24389)."""

from dataclasses import replace

from vllm_dlm.families.llada import FAMILY as LLADA

FAMILY = replace(
    LLADA,
    architecture="LLaDAMoEModelLM",
    model="vllm_dlm.families.llada_moe.model:LLaDAMoEModelLM",
    config="vllm_dlm.families.llada_moe.config:LLaDAMoEConfig",
    end_of_turn="<|role_end|>",
    qk_norm=True,
    rope_full_precision=False,
)
