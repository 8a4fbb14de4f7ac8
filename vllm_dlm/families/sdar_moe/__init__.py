"""SDAR with experts: 30B-A3B Chat, Sci (https://arxiv.org/abs/2510.06303)."""

from dataclasses import replace

from vllm_dlm.families.sdar import FAMILY as SDAR

FAMILY = replace(
    SDAR,
    architecture="SDARMoeForCausalLM",
    model_type="sdar_moe",
    model="vllm_dlm.families.sdar_moe.model:SDARMoeForCausalLM",
    config="vllm_dlm.families.sdar_moe.config:SDARMoeConfig",
)
