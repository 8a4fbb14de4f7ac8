"""Dream: Dream-v0, Dream-Coder, DiffuCoder (https://arxiv.org/abs/2508.15487)."""

from vllm_dlm.families.family import Family

FAMILY = Family(
    architecture="DreamModel",
    model_type="Dream",
    model="vllm_dlm.families.dream.model:DreamModel",
    config="vllm_dlm.families.dream.config:DreamConfig",
    decoding="entropy",
    end_of_turn="<|im_end|>",
    presets={
        "serve": {
            "decoding": {"name": "maskgit_plus", "block_length": 32, "threshold": 0.9},
            "reuse": {"name": "fast_dllm", "cache": "dual"},
            "extent": {"name": "window", "window": 96},
        },
        "d3llm": {
            "decoding": {"name": "multi_block/dream", "block_length": None},
            "reuse": {"name": "delayed/dream"},
        },
        "dparallel": {"decoding": {"name": "multi_block/dparallel"}},
    },
    canvas=256,  # from the paper's evaluations with short answers
    context=2048,  # config.json has Qwen2's 131,072
    logits_shift=1,
    qkv_bias=True,
    tokenizer="vllm_dlm.families.dream.config:DreamTokenizer",
)
