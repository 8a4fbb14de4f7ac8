"""A request for a canvas, parsed, tokenised and checked. Created once in the front-end and sent to the engine.

It is sent as plain data under one key of `SamplingParams.extra_args`, vLLM's field for plugin data. Clients cannot
write that key, because their options start with `dlm_`. The prompt and `max_tokens` are sent in vLLM's own fields.
Methods are sent as name and fields, so the engine builds them without parsing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from vllm_dlm.methods import KINDS, methods
from vllm_dlm.options import Options, suited
from vllm_dlm.options.scored import Scored
from vllm_dlm.options.texts import Layout

#: key of `extra_args`
CANVAS_REQUEST = "canvas_request"
#: fields of Options that a request may set in addition to its methods, and that the engine reads
FLAGS = ("frames", "watch", "trajectory")


@dataclass(frozen=True)
class CanvasRequest:
    options: Options
    layout: Layout
    prompt_ids: list[int]  # ids that the model reads, followed by the suffix
    max_tokens: int
    length: int  # positions of the canvas, including the prompt

    def to_wire(self) -> dict[str, Any]:
        chosen = {kind: method_to_wire(getattr(self.options, kind)) for kind in chosen_kinds(self.options)}
        flags = {field: True for field in FLAGS if getattr(self.options, field)}
        return {"length": self.length, "methods": chosen, **flags, "layout": self.layout.to_wire()}

    @classmethod
    def from_wire(
        cls, wire: Mapping[str, Any], server: Options, prompt_ids: list[int], max_tokens: int
    ) -> "CanvasRequest":
        """`server`: the server's options, which provide the fields that a request cannot change"""
        chosen = {kind: method_from_wire(kind, *wire["methods"][kind]) for kind in chosen_kinds(server)}
        flags = {field: wire.get(field, False) for field in FLAGS}
        options = suited(replace(server, **chosen, **flags))
        return cls(options, Layout(**wire["layout"]), prompt_ids, max_tokens, wire["length"])


def chosen_kinds(options: Options) -> tuple[str, ...]:
    """Kinds of methods that a request chooses. A block-causal model has one extent."""
    return KINDS if options.attention == "full" else ("decoding", "reuse", "selection")


def method_to_wire(method: Any) -> tuple[str, dict[str, Any]]:
    return method.name, {field.name: getattr(method, field.name) for field in fields(method)}


def method_from_wire(kind: str, name: str, values: Mapping[str, Any]) -> Any:
    cls: Any = Scored if name == Scored.name else methods(kind)[name]
    return cls(**{field: hashable(value) for field, value in values.items()})


def hashable(value: Any) -> Any:
    """Undoes msgpack's conversion of tuples to lists."""
    return tuple(map(hashable, value)) if isinstance(value, list) else value
