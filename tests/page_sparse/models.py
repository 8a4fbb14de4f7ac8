"""Writes checkpoints of small random decoders of four families in the hub's format."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Olmo3Config, Qwen2Config, Qwen3Config

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.12,  # wide enough for attention to prefer some keys
    "tie_word_embeddings": False,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE | {"num_key_value_heads": 4}),
    "mistral": lambda: MistralConfig(**SHAPE | {"num_key_value_heads": 1, "sliding_window": None}),
}
#: has a sliding window in three of four layers
WINDOWED = {
    "olmo3": lambda: Olmo3Config(**SHAPE | {"num_hidden_layers": 8}, sliding_window=64, eos_token_id=0, pad_token_id=0)
}


def write(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config((CONFIGS | WINDOWED)[name](), torch_dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases, which start as ones and zeros
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder
