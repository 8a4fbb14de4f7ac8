"""The record of a model family: plain data for vLLM and the engine, read in every process."""

import importlib
from dataclasses import dataclass, field, replace
from typing import Any

#: which keys a row attends to: all keys of the canvas, or those up to the end of its own block
ATTENTION = ("full", "block_causal")


@dataclass(frozen=True)
class Family:
    """Record of one family. `model`, `config` and `tokenizer` are "module:class" and are imported on demand."""

    architecture: str  # as config.json spells it; families may share a model_type
    model_type: str  # of the config class; config.json may have another one, see `written_model_type`
    model: str
    config: str
    decoding: str  # default decoding of a server
    end_of_turn: str  # token that ends a response, in addition to the tokenizer's end of text
    #: objects for `--dlm-config`, chosen as its "preset"
    presets: dict[str, dict] = field(default_factory=dict)
    canvas: int = 256  # tokens of a response if neither request, server nor checkpoint sets the number
    #: default max_model_len, if config.json has more positions than the model was trained on
    context: int | None = None
    logits_shift: int = 0  # logits at position i predict the token at i + shift
    attention: str = "full"
    qkv_bias: bool = False
    qk_norm: bool = False  # queries and keys are normalized per head before the rotary embedding
    rope_full_precision: bool = False  # True: rotate in float32; False: with tables in the model's dtype
    tokenizer: str | None = None  # set if transformers lacks the tokenizer class that checkpoints name
    aliases: tuple[str, ...] = ()  # other names of the architecture in config.json
    #: model_type in config.json if it belongs to other models; such checkpoints are recognised by their architecture
    written_model_type: str | None = None
    #: fields of the record that differ if config.json or `--hf-overrides` has a `block_size`: for architectures whose
    #: config.json does not say which attention the checkpoint was trained with
    with_block_size: dict[str, Any] = field(default_factory=dict)
    #: defaults of a chat's `chat_template_kwargs`
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.attention not in ATTENTION:
            raise ValueError(f"attention: {self.attention!r} is not valid, it must be one of {', '.join(ATTENTION)}")

    @property
    def architectures(self) -> tuple[str, ...]:
        return self.architecture, *self.aliases

    def of(self, config: Any) -> "Family":
        """The record of a checkpoint with this config"""
        other = self.with_block_size if getattr(config, "block_size", None) is not None else {}
        return replace(self, **other) if other else self


def imported(path: str) -> Any:
    """Imports the object that "module:name" refers to."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
