"""A2D over Qwen3: Tiny-A2D 0.6B of dLLM, OPDLM 4B and 8B (https://github.com/ZHZisZZ/dllm).

Autoregressive models with further training to fill masks, with full attention (mdlm) or block-causal attention
(bd3lm). config.json is the same for both.
"""

from vllm_dlm.families.family import Family

FAMILY = Family(
    architecture="A2DQwen3LMHeadModel",
    model_type="a2d-qwen3",
    model="vllm_dlm.families.sdar.model:SDARForCausalLM",
    config="vllm_dlm.families.a2d_qwen3.config:A2DQwen3Config",
    decoding="low_confidence",
    end_of_turn="<|im_end|>",
    presets={
        "serve": {
            "decoding": {"name": "low_confidence", "block_length": 32, "threshold": 0.9},
            "reuse": {"name": "fast_dllm", "cache": "dual"},
            "extent": {"name": "window", "window": 96},
        }
    },
    canvas=128,  # of the published chats
    qk_norm=True,
    with_block_size={
        "attention": "block_causal",
        "decoding": "low_confidence_static",
        "presets": {"serve": {"decoding": {"name": "low_confidence_dynamic"}}},
    },
    template_kwargs={"enable_thinking": False},  # the models were trained without thinking
)
