"""A2D over Llama: dLLM's code without published checkpoints (https://github.com/ZHZisZZ/dllm)."""

from dataclasses import replace

from vllm_dlm.families.a2d_qwen3 import FAMILY as QWEN3

FAMILY = replace(
    QWEN3,
    architecture="A2DLlamaLMHeadModel",
    model_type="a2d-llama",
    config="vllm_dlm.families.a2d_llama.config:A2DLlamaConfig",
    end_of_turn="<|eot_id|>",
    qk_norm=False,
    template_kwargs={},
)
