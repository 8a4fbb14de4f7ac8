"""Options of a server and of a request: parses and validates them, and names the field that is wrong.

A server takes one object: four methods, each `{"name": …, **fields}`, the
bounds of a canvas, and limits. A request may override single fields of the
decoding as `dlm_<field>` and choose other methods by name. Options are plain
data without tensors.
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

#: options of a request that name a method; most others are `dlm_` + a field of the decoding
METHOD_KEYS = {"dlm_decoding": "decoding", "dlm_reuse": "reuse", "dlm_selection": "selection", "dlm_extent": "extent"}
#: the one field of another kind that a request may set, and so choose the method that has it
WINDOW = "dlm_window"
#: fields of a request's own, which a server has none of: its name -> the field of Options
REQUEST_FIELDS = {
    "dlm_infill": "infill",
    "dlm_frames": "frames",
    "dlm_watch": "watch",
    "dlm_trajectory": "trajectory",
}
#: names that options of a request had before -> those that they have
RENAMED = {"dlm_algorithm": "dlm_decoding", "dlm_draft": "dlm_start"}
#: parts of the server's object
PARTS = (*KINDS, "canvas", "limits", "preset")


@dataclass(frozen=True)
class CanvasBounds:
    """Bounds on the length of a response. Every step computes all of it, so a server limits what it pays for."""

    name: ClassVar[str] = "canvas"

    default: int | None = None  # of a request that gives no max_tokens; None: the checkpoint's or its family's
    max: int | None = None  # the longest a request may ask for

    def __post_init__(self):
        for field in ("default", "max"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field}: {shown(value)} is not valid, it must be at least 1")
        if self.default is not None and self.max is not None and self.default > self.max:
            raise ValueError(f"default: {shown(self.default)} is not valid, it must be at most max, {self.max}")

    def length(self, usual: int) -> int:
        """Response of a request without max_tokens, `usual` being the model's default"""
        length = usual if self.default is None else self.default
        return length if self.max is None else min(length, self.max)


@dataclass(frozen=True)
class Options:
    """The methods and flags of a request; see the classes in plugins/ for the fields of methods."""

    decoding: Any
    reuse: Any
    selection: Any
    extent: Any
    canvas: CanvasBounds = CanvasBounds()
    limits: Limits = DEFAULT_LIMITS
    attention: str = "full"  # of the model, see Family
    infill: bool | None = None  # masks of the prompt are filled; None: they are if the client wrote token ids
    frames: bool = False  # the stream carries what each step does, see view/
    watch: bool = False  # others may follow it
    trajectory: bool = False  # the response carries the step that filled each token
    texts: CanvasTexts = NO_TEXTS

    @property
    def caches(self) -> bool:
        """Whether keys and values are written to KV blocks: later steps read them, or a selection or shadows do in this
        step."""
        shadows, kept = isinstance(self.decoding, RevokingDecoding), self.attention != "full"
        return self.reuse.caches or self.selection.sparse or shadows or kept

    @property
    def grows(self) -> bool:
        """A canvas starts small and grows, so its length is an upper bound and may be omitted."""
        return self.extent.grows or self.attention != "full"

    @property
    def observed(self) -> bool:
        """Whether its steps are reported"""
        return self.frames or self.watch

    @property
    def canvases(self) -> int:
        """Most canvases of a request in one step, see canvas/speculation.py. Speculative ones share all but their
        canvas block, and there are none with guidance or a selection."""
        alone = self.reuse.block_alone and not self.selection.sparse and not self.decoding.cfg_scale
        return self.decoding.drafts if alone and isinstance(self.decoding, SpeculativeDecoding) else 1

    def canvas_length(self, prompt_len: int, max_tokens: int, max_model_len: int) -> int:
        """Positions of a request's canvas, including its prompt. It ends at the model's length at the latest. With
        block-causal attention it ends at a multiple of the block's width, or in a shorter block at the model's
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
    """Parses the object of `--dlm-config` or `additional_config["dlm"]`. `presets`: such objects by name;
    `attention`: of the model; `block_length`: with which it was trained"""
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
    """The options with what the model's attention requires. `prefix`: of the names of fields in errors"""
    if options.attention == "full":
        return options
    whole = "is of models whose attention sees the whole canvas"
    why = {
        "reuse": "has nothing to save where keys of finished blocks are exact: this model recomputes none of them",
        "extent": whole,
    }
    for kind, only in (("reuse", "none"), ("extent", "full")):
        method = getattr(options, kind)
        if (name := method.name) != only and not getattr(method, "block_causal", False):
            raise OptionError(f"{prefix}{kind}", f"{prefix}{kind}: {name!r} {why[kind]}")
    decoding = options.decoding
    if decoding.block_length is None:
        raise OptionError("dlm_block_length", "dlm_block_length: this model needs the width of its blocks")
    if isinstance(decoding, RevokingDecoding):
        raise OptionError("dlm_decoding", f"dlm_decoding: {options.decoding.name!r} {whole}")
    if field := options.texts.any:
        behind = "this model reads a canvas block by block, and a block sees nothing of what comes behind it"
        reject(f"dlm_{field}", getattr(options.texts, field), behind)
    return options


def _upon_preset(written: Mapping[str, Any], presets: Mapping[str, dict]) -> dict[str, Any]:
    """The preset's parts. If `written` has a part, too, its fields replace those of the preset; a method that it names
    replaces all of the part."""
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
    """The server's options with a request's `dlm_*` values (`SamplingParams.extra_args`, `vllm_xargs`)."""
    written = {key: value for key, value in current_names(extra_args or {}).items() if key.startswith("dlm_")}
    if SCORE in written:  # always by the exact model
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
    """Options of a request under the names that they have today"""
    named = dict(written)
    for old, name in RENAMED.items():
        if old in named:
            value = named.pop(old)
            if name in named and named[name] != value:
                raise OptionError(
                    name, f"{name}: {shown(named[name])} differs from {old}, its old name, which is {shown(value)}"
                )
            named[name] = value
    return named


def request_keys(decoding: Any) -> list[str]:
    """Options that a request may give to a server with this decoding"""
    own = (f"dlm_{field.name}" for field in fields(decoding))
    return sorted([*METHOD_KEYS, *REQUEST_FIELDS, *TEXT_KEYS, WINDOW, *own])


def _with_window(extent: Any, value: Any, named: bool):
    """The extent with another window, or the one that has a window if the request names none."""
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
    """The method and its fields together, since a method may need the values that come with it."""
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
    """Which of the server's values a request would have to unset."""
    for field, value in kept.items():
        if value is not None and may_be_unset(cls, field):
            try:
                cls(**{**kept, **values, field: None})
            except ValueError:
                continue
            return f'; this server sets {field}, and dlm_{field}: "none" unsets it'
    return ""
