"""RND1: 30B-A3B Base (https://github.com/RadicalNumerics/RND1)."""

from vllm_dlm.families.family import Family

FAMILY = Family(
    architecture="RND1",
    aliases=("RND1LM",),  # name in the published code
    model_type="rnd1",
    model="vllm_dlm.families.sdar_moe.model:SDARMoeForCausalLM",
    config="vllm_dlm.families.rnd1.config:RND1Config",
    decoding="entropy_schedule",
    end_of_turn="<|im_end|>",
    presets={
        "serve": {
            "decoding": {"name": "maskgit_plus", "block_length": 32, "threshold": 0.9},
            "reuse": {"name": "fast_dllm", "cache": "dual"},
            "extent": {"name": "window", "window": 96},
        }
    },
    canvas=256,  # num_diffusion_steps of config.json
    logits_shift=1,
    qk_norm=True,
)
