"""LLaDA-MoE: 7B-A1B Base, Instruct (https://arxiv.org/abs/2509.24389)."""

from vllm_dlm.families.family import Family

FAMILY = Family(
    architecture="LLaDAMoEModelLM",
    model_type="llada",
    model="vllm_dlm.families.llada_moe.model:LLaDAMoEModelLM",
    config="vllm_dlm.families.llada_moe.config:LLaDAMoEConfig",
    decoding="low_confidence",
    end_of_turn="<|role_end|>",
    presets={
        "serve": {
            "decoding": {"name": "low_confidence", "block_length": 32, "threshold": 0.9},
            "reuse": {"name": "fast_dllm", "cache": "dual"},
            "extent": {"name": "window", "window": 96},
        }
    },
    canvas=256,
    qk_norm=True,
)
