"""LLaDA: 8B Base, Instruct, 1.5, and the tied grouped-query iLLaDA (https://arxiv.org/abs/2502.09992)."""

from vllm_dlm.families.family import Family

FAMILY = Family(
    architecture="LLaDAModelLM",
    model_type="llada",
    model="vllm_dlm.families.llada.model:LLaDAModelLM",
    config="vllm_dlm.families.llada.config:LLaDAConfig",
    decoding="low_confidence",
    end_of_turn="<|eot_id|>",
    presets={
        "serve": {
            "decoding": {"name": "low_confidence", "block_length": 32, "threshold": 0.9},
            "reuse": {"name": "fast_dllm", "cache": "dual"},
            "extent": {"name": "window", "window": 96},
        },
        "dllm-var": {
            "decoding": {"name": "low_confidence", "block_length": 64, "threshold": 0.9},
            "reuse": {"name": "frozen"},
            "extent": {"name": "block"},
        },
        "d3llm": {
            "decoding": {"name": "multi_block/llada", "block_length": None},
            "reuse": {"name": "delayed/llada"},
        },
        "dparallel": {"decoding": {"name": "multi_block/dparallel"}},
    },
    canvas=256,  # from the paper's evaluations with short answers
    rope_full_precision=True,
)
