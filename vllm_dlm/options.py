"""Options of a server and of a request. Parses and validates them; errors name the invalid field.

A server takes one object: four methods, each `{"name": …, **fields}`, the
bounds of a canvas, and limits. A request can override fields of the decoding as
`dlm_<field>` and choose other methods by name. Options are plain data without
tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, ClassVar

from vllm_dlm.canvas_texts import NO_TEXTS, TEXT_KEYS, CanvasTexts
from vllm_dlm.limits import DEFAULT_LIMITS, Limits
from vllm_dlm.method_options import (
    build,
    build_method,
    does_not_go,
    field_of,
    method_by_name,
    method_class,
    shared_fields,
)
from vllm_dlm.methods import KINDS, methods
from vllm_dlm.option_types import OptionError, may_be_unset, reject, typed
from vllm_dlm.plugins.decoding.roles import RevokingDecoding, SpeculativeDecoding, without_speculation
from vllm_dlm.scored import SCORE, Scored
from vllm_dlm.shown import short, shown

#: options of a request that name a method; most other options are `dlm_` + a field of the decoding
METHOD_KEYS = {"dlm_decoding": "decoding", "dlm_reuse": "reuse", "dlm_selection": "selection", "dlm_extent": "extent"}
#: the only field of another kind of method that a request can set; it also selects that method
WINDOW = "dlm_window"
#: options that only a request can set -> field of Options
REQUEST_FIELDS = {
    "dlm_infill": "infill",
    "dlm_frames": "frames",
    "dlm_watch": "watch",
    "dlm_trajectory": "trajectory",
}
#: deprecated name of a request's option -> current name
RENAMED = {"dlm_algorithm": "dlm_decoding", "dlm_draft": "dlm_start"}
#: parts of the server's object
PARTS = (*KINDS, "canvas", "limits", "preset")


@dataclass(frozen=True)
class CanvasBounds:
    """Bounds on the length of a response. Every step computes all of it, so a server limits the cost."""

    name: ClassVar[str] = "canvas"

    default: int | None = None  # for requests without max_tokens; None: the checkpoint's or its family's
    max: int | None = None  # upper bound for all requests

    def __post_init__(self):
        for field in ("default", "max"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field}: {shown(value)} is not valid, it must be at least 1")
        if self.default is not None and self.max is not None and self.default > self.max:
            raise ValueError(f"default: {shown(self.default)} is not valid, it must be at most max, {self.max}")

    def length(self, usual: int) -> int:
        """Response length of a request without max_tokens. `usual`: the model's default"""
        length = usual if self.default is None else self.default
        return length if self.max is None else min(length, self.max)


@dataclass(frozen=True)
class Options:
    """Methods and flags of a request. The fields of methods are in the classes in plugins/."""

    decoding: Any
    reuse: Any
    selection: Any
    extent: Any
    canvas: CanvasBounds = CanvasBounds()
    limits: Limits = DEFAULT_LIMITS
    attention: str = "full"  # the model's mask kind, see Family
    infill: bool | None = None  # masks of the prompt are filled; None: only in prompts of token ids
    frames: bool = False  # the stream includes the result of each step, see view/
    watch: bool = False  # others may watch the request
    trajectory: bool = False  # the response includes the step that filled each token
    texts: CanvasTexts = NO_TEXTS

    @property
    def caches(self) -> bool:
        """Whether keys and values are written to KV blocks, for later steps or for a selection or shadow of the same
        step."""
        shadows, kept = isinstance(self.decoding, RevokingDecoding), self.attention != "full"
        return self.reuse.caches or self.selection.sparse or shadows or kept

    @property
    def grows(self) -> bool:
        """Whether a canvas starts small and grows, so that its length is an upper bound and may be omitted."""
        return self.extent.grows or self.attention != "full"

    @property
    def observed(self) -> bool:
        """Whether the request's steps are reported"""
        return self.frames or self.watch

    @property
    def canvases(self) -> int:
        """Maximum number of canvases of a request in one step, see canvas/speculation.py. Nothing is speculated with
        guidance or a selection."""
        alone = self.reuse.block_alone and not self.selection.sparse and not self.decoding.cfg_scale
        return self.decoding.drafts if alone and isinstance(self.decoding, SpeculativeDecoding) else 1

    def canvas_length(self, prompt_len: int, max_tokens: int, max_model_len: int) -> int:
        """Number of positions of a request's canvas, including its prompt; at most the model's length. With
        block-causal attention it is a multiple of the block length, except that the last block may end at the model's
        length."""
        length = min(prompt_len + max_tokens, max_model_len)
        if self.attention == "full":
            return length
        width = self.decoding.block_length
        return min(-(-length // width) * width, max_model_len)

    def blocks(self, prompt_len: int, length: int) -> list[tuple[int, int]]:
        """[start, end) of each canvas block within the response"""
        if self.attention == "full":
            return self.decoding.blocks(length - prompt_len)
        width = self.decoding.block_length
        ends = [*range(width * (prompt_len // width + 1), length, width), length]
        return list(pairwise([0, *(end - prompt_len for end in ends)]))


def server_options(
    written: Mapping[str, Any] | None,
    default_decoding: str,
    presets: Mapping[str, dict] | None = None,
    attention: str = "full",
    block_length: int | None = None,
) -> Options:
    """Parses the object of `--dlm-config` or `additional_config["dlm"]`. `presets`: such objects by name; `attention`:
    the model's mask kind; `block_length`: block length of its training"""
    written = {} if written is None else written
    if not isinstance(written, Mapping):
        raise OptionError("dlm", f"dlm: {shown(written)} is not an object with the parts {', '.join(PARTS)}")
    for part in written:
        if part not in PARTS:
            raise OptionError(part, f"dlm: unknown part {shown(part)}, valid parts are {', '.join(PARTS)}")
    if "preset" in written:
        written = _upon_preset(written, presets or {})
    default = {"decoding": default_decoding, "reuse": "none", "selection": "none", "extent": "full"}
    chosen = {kind: build_method(kind, written.get(kind), default[kind]) for kind in KINDS}
    asked = written.get("decoding") or {}
    if block_length is not None and "block_length" not in asked and "preset" not in asked:
        chosen["decoding"] = replace(chosen["decoding"], block_length=block_length)
    canvas = build(CanvasBounds, "canvas", written.get("canvas"), {})
    limits = build(Limits, "limits", written.get("limits"), {})
    return suited(Options(**chosen, canvas=canvas, limits=limits, attention=attention), "dlm.")


def suited(options: Options, prefix: str = "dlm_") -> Options:
    """Checks options against the model's attention. `prefix`: prefix of field names in errors"""
    if options.attention == "full":
        return options
    whole = "is not supported: it requires attention to the whole canvas, and this model is block-causal"
    why = {
        "reuse": "is not supported: this model is block-causal and recomputes no finished block, so it must be 'none'",
        "extent": whole,
    }
    for kind, only in (("reuse", "none"), ("extent", "full")):
        if (name := getattr(options, kind).name) != only:
            raise OptionError(f"{prefix}{kind}", f"{prefix}{kind}: {name!r} {why[kind]}")
    decoding = options.decoding
    if decoding.block_length is None:
        raise OptionError(
            "dlm_block_length",
            "dlm_block_length: None is not valid, this model requires the length of its canvas blocks",
        )
    if isinstance(decoding, RevokingDecoding):
        raise OptionError("dlm_decoding", f"dlm_decoding: {options.decoding.name!r} {whole}")
    if field := options.texts.any:
        why = "this model is block-causal, so a canvas block does not attend to later positions"
        reject(f"dlm_{field}", getattr(options.texts, field), why)
    return options


def _upon_preset(written: Mapping[str, Any], presets: Mapping[str, dict]) -> dict[str, Any]:
    """Parts of the preset, overridden by `written`. Fields in `written` replace single fields of a part; a named method
    replaces the whole part."""
    name, listed = written["preset"], ", ".join(presets) or "none"
    if not isinstance(name, str) or name not in presets:
        raise OptionError("dlm.preset", f"dlm.preset: {shown(name)} is unknown, valid for this model are {listed}")
    parts = dict(presets[name])
    for part, value in written.items():
        if part != "preset":
            fields_alone = isinstance(value, Mapping) and "name" not in value
            parts[part] = {**parts.get(part, {}), **value} if fields_alone else value
    return parts


def request_options(server: Options, extra_args: Mapping[str, Any] | None) -> Options:
    """The server's options, overridden by a request's `dlm_*` values (`SamplingParams.extra_args`, `vllm_xargs`)."""
    written = {key: value for key, value in current_names(extra_args or {}).items() if key.startswith("dlm_")}
    if SCORE in written:  # scores always use the exact model
        exact = request_options(server, {"dlm_reuse": "none", "dlm_selection": "none", "dlm_extent": "full"})
        width = None if server.attention == "full" else server.decoding.block_length
        return replace(exact, decoding=Scored.from_request(written, width))
    chosen: dict[str, Any] = {
        field: typed(Options, field, written.pop(key), key) for key, field in REQUEST_FIELDS.items() if key in written
    }
    texts = {
        field: typed(CanvasTexts, field, written.pop(key), key) for key, field in TEXT_KEYS.items() if key in written
    }
    if texts:
        try:
            chosen["texts"] = CanvasTexts(**texts)
        except ValueError as error:
            raise OptionError(f"dlm_{field_of(error)}", f"dlm_{error}") from None
    for key, kind in METHOD_KEYS.items():
        if kind != "decoding" and key in written:
            chosen[kind] = method_by_name(kind, written.pop(key), key, getattr(server, kind))
    if WINDOW in written:
        chosen["extent"] = _with_window(chosen.get("extent", server.extent), written.pop(WINDOW), "extent" in chosen)
    if written:
        chosen["decoding"] = _requested_decoding(server.decoding, written)
    if "texts" in chosen and chosen["texts"].template:
        chosen["decoding"] = without_speculation(chosen.get("decoding", server.decoding))
    return suited(replace(server, **chosen))


def current_names(written: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a request under their current names"""
    named = dict(written)
    for old, name in RENAMED.items():
        if old in named:
            value = named.pop(old)
            if name in named and named[name] != value:
                raise OptionError(
                    name,
                    f"{name}: {shown(named[name])} differs from {shown(value)}, the value of its deprecated name {old}",
                )
            named[name] = value
    return named


def request_keys(decoding: Any) -> list[str]:
    """Options that a request to a server with this decoding can set"""
    own = (f"dlm_{field.name}" for field in fields(decoding))
    return sorted([*METHOD_KEYS, *REQUEST_FIELDS, *TEXT_KEYS, WINDOW, *own])


def _with_window(extent: Any, value: Any, named: bool):
    """The extent with another window. Selects the extent `window` if the request names no extent."""
    if not hasattr(extent, "window"):
        if named:
            raise OptionError(WINDOW, f"{WINDOW}: extent {extent.name!r} has no window")
        extent = methods("extent")["window"]()
    window = typed(type(extent), "window", value, WINDOW)
    try:
        return replace(extent, window=window)
    except ValueError as error:
        raise OptionError(WINDOW, f"dlm_{error}") from None


def _requested_decoding(current: Any, written: Mapping[str, Any]) -> Any:
    """The requested decoding. Method and fields are set together, because a method may require some of the fields."""
    cls: Any = type(current)
    values: dict[str, Any] = {}
    if "dlm_decoding" in written:
        cls, values = method_class("decoding", written["dlm_decoding"], "dlm_decoding")
    known = {f"dlm_{field.name}": field.name for field in fields(cls)}
    for key, value in written.items():
        if key in known:
            values = values | {known[key]: typed(cls, known[key], value, key)}
        elif key != "dlm_decoding":
            valid = ", ".join(request_keys(cls))
            raise OptionError(key, f"{short(key)}: {cls.name!r} decoding has no such option, valid are {valid}")
    kept = {field: getattr(current, field) for field in shared_fields(cls, current) if field not in values}
    if cls is not type(current):
        required = {field.name for field in fields(cls) if "required" in field.metadata}
        kept = {field: value for field, value in kept.items() if value is not None or field not in required}
    try:
        return cls(**(kept | values))
    except ValueError as error:
        key, way_out = f"dlm_{field_of(error)}", _way_out(cls, kept, values)
        if cls is type(current) or key in written:
            raise OptionError(key, f"dlm_{error}{way_out}") from None
        raise does_not_go("dlm_decoding", written["dlm_decoding"], f"{error}{way_out}") from None


def _way_out(cls: Any, kept: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """Hint about the server's value that a request must unset."""
    for field, value in kept.items():
        if value is not None and may_be_unset(cls, field):
            try:
                cls(**{**kept, **values, field: None})
            except ValueError:
                continue
            return f'; this server sets {field}, and dlm_{field}: "none" unsets it'
    return ""
