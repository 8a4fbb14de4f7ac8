"""Config and tokenizer classes for Dream checkpoints from the hub."""

from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from vllm_dlm.families.config import PlainRopeConfig
from vllm_dlm.families.dream import FAMILY


class DreamConfig(PlainRopeConfig):
    family = FAMILY
    model_type = FAMILY.model_type

    implemented = {
        "hidden_act": "silu",
        "use_sliding_window": False,
        "rope_type": "default",
        "use_mrope": False,
    }


class DreamTokenizer(Qwen2Tokenizer):
    """Qwen2's tokenizer under the class name that Dream checkpoints use for vocab.json and merges.txt."""
