"""What vLLM and the engine have to be told about a family of models: plain data, read in every process."""

import importlib
from dataclasses import dataclass, field
from typing import Any

#: which keys a row of a canvas sees: all of them, or those up to the end of its own block
ATTENTION = ("full", "block_causal")


@dataclass(frozen=True)
class Family:
    """One record for each. `model`, `config` and `tokenizer` are "module:class", imported when they are needed."""

    architecture: str  # as config.json spells it; families may share a model_type
    model_type: str
    model: str
    config: str
    decoding: str  # of a server that names none
    end_of_turn: str  # ends a response beside the tokenizer's end of text
    #: objects for `--dlm-config`, chosen as its "preset"
    presets: dict[str, dict] = field(default_factory=dict)
    canvas: int = 256  # tokens of a response when neither request, server nor checkpoint says how many
    #: positions of a server that says none, where config.json promises more than the model was trained on
    context: int | None = None
    logits_shift: int = 0  # logits at position i predict the token at i + shift
    attention: str = "full"
    qkv_bias: bool = False
    qk_norm: bool = False  # queries and keys are normalised, head by head, before they are rotated
    rope_full_precision: bool = False  # rotated in float32, or with tables in the model's dtype
    tokenizer: str | None = None  # where transformers has no class of the name that checkpoints give

    def __post_init__(self):
        if self.attention not in ATTENTION:
            raise ValueError(f"attention: {self.attention!r} is not valid, it must be one of {', '.join(ATTENTION)}")


def imported(path: str) -> Any:
    """What a "module:name" stands for."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
