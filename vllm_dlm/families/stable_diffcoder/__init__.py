"""Stable-DiffCoder: 8B Base, Instruct (https://huggingface.co/ByteDance-Seed/Stable-DiffCoder-8B-Instruct).

config.json has Llama's model_type, so checkpoints are recognised by their architecture.
"""

from vllm_dlm.families.family import Family

FAMILY = Family(
    architecture="StableDiffcoderForCausalLM",
    model_type="stable_diffcoder",
    written_model_type="llama",
    model="vllm_dlm.families.sdar.model:SDARForCausalLM",
    config="vllm_dlm.families.stable_diffcoder.config:StableDiffcoderConfig",
    decoding="low_confidence_static",
    end_of_turn="<[end▁of▁sentence]>",
    presets={"serve": {"decoding": {"name": "low_confidence_static", "threshold": 0.95}}},
    attention="block_causal",
)
