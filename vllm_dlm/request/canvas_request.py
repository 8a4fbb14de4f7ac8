"""One request for a canvas, parsed, tokenised and checked: made once in the front-end and carried to the engine.

It travels as plain data in `SamplingParams.extra_args`, vLLM's field for what plugins add to a request, under one key.
Clients cannot write that key: their options start with `dlm_`. The prompt and `max_tokens` travel in vLLM's own fields.
Methods travel by name with their fields, so that the engine builds them without parsing anything again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from vllm_dlm.canvas_texts import Layout
from vllm_dlm.methods import KINDS, methods
from vllm_dlm.options import Options, suited
from vllm_dlm.scored import Scored

#: key of `extra_args`
CANVAS_REQUEST = "canvas_request"
#: fields of Options that a request may set in addition to its methods, and that the engine reads
FLAGS = ("frames", "watch", "trajectory")


@dataclass(frozen=True)
class CanvasRequest:
    options: Options
    layout: Layout
    prompt_ids: list[int]  # as the model reads them, with the suffix at the end
    max_tokens: int
    length: int  # positions of the canvas, with the prompt

    def to_wire(self) -> dict[str, Any]:
        chosen = {kind: method_to_wire(getattr(self.options, kind)) for kind in chosen_kinds(self.options)}
        flags = {field: True for field in FLAGS if getattr(self.options, field)}
        return {"length": self.length, "methods": chosen, **flags, "layout": self.layout.to_wire()}

    @classmethod
    def from_wire(
        cls, wire: Mapping[str, Any], server: Options, prompt_ids: list[int], max_tokens: int
    ) -> "CanvasRequest":
        """`server`: the server's options, which supply what a request cannot change"""
        chosen = {kind: method_from_wire(kind, *wire["methods"][kind]) for kind in chosen_kinds(server)}
        flags = {field: wire.get(field, False) for field in FLAGS}
        options = suited(replace(server, **chosen, **flags))
        return cls(options, Layout(**wire["layout"]), prompt_ids, max_tokens, wire["length"])


def chosen_kinds(options: Options) -> tuple[str, ...]:
    """Kinds of methods that a request chooses. Block-causal models have their own reuse and extent, which `suited`
    builds from the decoding."""
    return KINDS if options.attention == "full" else ("decoding", "selection")


def method_to_wire(method: Any) -> tuple[str, dict[str, Any]]:
    return method.name, {field.name: getattr(method, field.name) for field in fields(method)}


def method_from_wire(kind: str, name: str, values: Mapping[str, Any]) -> Any:
    cls: Any = Scored if name == Scored.name else methods(kind)[name]
    return cls(**{field: hashable(value) for field, value in values.items()})


def hashable(value: Any) -> Any:
    """msgpack turns the tuples of a method's fields into lists."""
    return tuple(map(hashable, value)) if isinstance(value, list) else value
