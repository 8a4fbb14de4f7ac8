"""Server options and per-request options: parse, validate, name the field that is wrong.

A server takes one object: four methods, each `{"name": …, **fields}`, and the
bounds of a canvas. A request may override single decoding fields as
`dlm_<field>` and pick another method by name. Everything here is plain data,
so the front-end (to refuse), the scheduler and the workers (to obey) read a
request the same way.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, ClassVar

from vllm_dlm.given import GIVEN_KEYS, NOTHING_GIVEN, Given
from vllm_dlm.limits import DEFAULT_LIMITS, Limits
from vllm_dlm.methods import KINDS, methods
from vllm_dlm.option_types import OptionError, may_be_unset, typed
from vllm_dlm.plugins.decoding.roles import RevokingDecoding, SpeculativeDecoding, without_speculation
from vllm_dlm.scoring.scored import SCORE, Scored
from vllm_dlm.shown import short, shown

#: per-request names; every other one is `dlm_` + a field of the decoding algorithm
METHOD_KEYS = {"dlm_algorithm": "decoding", "dlm_reuse": "reuse", "dlm_selection": "selection", "dlm_extent": "extent"}
#: the one field of another kind that a request may set, and so choose the method that has it
WINDOW = "dlm_window"
#: fields of a request's own, which a server has none of: its name -> the field of Options
REQUEST_FIELDS = {
    "dlm_infill": "infill", "dlm_frames": "frames", "dlm_watch": "watch", "dlm_trajectory": "trajectory",
}  # fmt: skip
#: parts of the server's object
PARTS = (*KINDS, "canvas", "limits", "preset")


@dataclass(frozen=True)
class CanvasBounds:
    """How long a response may be. Every step computes all of it, so a server says what it is ready to pay for."""

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
        """Of a request that gives no max_tokens, where `usual` is the model's habit."""
        length = usual if self.default is None else self.default
        return length if self.max is None else min(length, self.max)


@dataclass(frozen=True)
class Options:
    """One answer to each question; see the classes in plugins/ for the fields."""

    decoding: Any
    reuse: Any
    selection: Any
    extent: Any
    canvas: CanvasBounds = CanvasBounds()
    limits: Limits = DEFAULT_LIMITS
    attention: str = "full"  # of the model, see Family
    infill: bool | None = None  # masks of the prompt are holes; None: they are if the client wrote token ids
    frames: bool = False  # the stream carries what each step does, see view/
    watch: bool = False  # others may follow it
    trajectory: bool = False  # the response carries the step that filled each token
    given: Given = NOTHING_GIVEN  # of the canvas

    @property
    def caches(self) -> bool:
        """Keys and values are written to KV blocks: later steps read them, or in this one a selection or shadows do."""
        shadows, kept = isinstance(self.decoding, RevokingDecoding), self.attention != "full"
        return self.reuse.caches or self.selection.sparse or shadows or kept

    @property
    def grows(self) -> bool:
        """A canvas starts small and grows, so its length is an upper bound and may be omitted."""
        return self.extent.grows or self.attention != "full"

    @property
    def observed(self) -> bool:
        """Somebody looks at its steps, or may."""
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
    given: Mapping[str, Any] | None, default_decoding: str, presets: Mapping[str, dict] | None = None,
    attention: str = "full", block_length: int | None = None,
) -> Options:  # fmt: skip
    """The object of `--dlm-config` / `additional_config["dlm"]`. `presets`: such objects, chosen by name; `attention`:
    the model's; `block_length`: what it was trained with."""
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise OptionError("dlm", f"dlm: {shown(given)} is not an object with the parts {', '.join(PARTS)}")
    for part in given:
        if part not in PARTS:
            raise OptionError(part, f"dlm: unknown part {shown(part)}, valid parts are {', '.join(PARTS)}")
    if "preset" in given:
        given = _upon_preset(given, presets or {})
    default = {"decoding": default_decoding, "reuse": "none", "selection": "none", "extent": "full"}
    chosen = {kind: _part(kind, given.get(kind), default[kind]) for kind in KINDS}
    asked = given.get("decoding") or {}
    if block_length is not None and "block_length" not in asked and "preset" not in asked:
        chosen["decoding"] = replace(chosen["decoding"], block_length=block_length)
    canvas = _built(CanvasBounds, "canvas", given.get("canvas"), {})
    limits = _built(Limits, "limits", given.get("limits"), {})
    return _suited(Options(**chosen, canvas=canvas, limits=limits, attention=attention), "dlm.")


def _suited(options: Options, prefix: str) -> Options:
    """As a model needs it whose attention knows blocks. `prefix`: of the names of fields"""
    if options.attention == "full":
        return options
    whole = "is of models whose attention sees the whole canvas"
    why = {
        "reuse": "has nothing to save where keys of finished blocks are exact: this model recomputes none of them",
        "extent": whole,
    }
    for kind, only in (("reuse", "none"), ("extent", "full")):
        if (name := getattr(options, kind).name) != only:
            raise OptionError(f"{prefix}{kind}", f"{prefix}{kind}: {name!r} {why[kind]}")
    decoding = options.decoding
    if decoding.block_length is None:
        raise OptionError("dlm_block_length", "dlm_block_length: this model needs the width of its blocks")
    if isinstance(decoding, RevokingDecoding):
        raise OptionError("dlm_algorithm", f"dlm_algorithm: {options.decoding.name!r} {whole}")
    if field := options.given.any:
        behind = "this model reads a canvas block by block, and a block sees nothing of what comes behind it"
        value = shown(getattr(options.given, field))
        raise OptionError(f"dlm_{field}", f"dlm_{field}: {value} cannot be honoured, {behind}")
    return options


def _upon_preset(given: Mapping[str, Any], presets: Mapping[str, dict]) -> dict[str, Any]:
    """The preset's parts; of those that are given, too, the fields, or all if a method is named."""
    name, listed = given["preset"], ", ".join(presets) or "none"
    if not isinstance(name, str) or name not in presets:
        raise OptionError("dlm.preset", f"dlm.preset: {shown(name)} is unknown, valid for this model are {listed}")
    parts = dict(presets[name])
    for part, value in given.items():
        if part != "preset":
            fields_alone = isinstance(value, Mapping) and "name" not in value
            parts[part] = {**parts.get(part, {}), **value} if fields_alone else value
    return parts


def request_options(server: Options, extra_args: Mapping[str, Any] | None) -> Options:
    """The server's options with a request's `dlm_*` values (`SamplingParams.extra_args`, `vllm_xargs`)."""
    given = {key: value for key, value in (extra_args or {}).items() if key.startswith("dlm_")}
    if SCORE in given:  # always by the exact model
        exact = request_options(server, {"dlm_reuse": "none", "dlm_selection": "none", "dlm_extent": "full"})
        width = None if server.attention == "full" else server.decoding.block_length
        return replace(exact, decoding=Scored.of(given, width))
    chosen: dict[str, Any] = {
        field: typed(Options, field, given.pop(key), key) for key, field in REQUEST_FIELDS.items() if key in given
    }
    parts = {field: typed(Given, field, given.pop(key), key) for key, field in GIVEN_KEYS.items() if key in given}
    if parts:
        try:
            chosen["given"] = Given(**parts)
        except ValueError as error:
            raise OptionError(f"dlm_{_field_of(error)}", f"dlm_{error}") from None
    for key, kind in METHOD_KEYS.items():
        if kind != "decoding" and key in given:
            chosen[kind] = _named(kind, given.pop(key), key, getattr(server, kind))
    if WINDOW in given:
        chosen["extent"] = _with_window(chosen.get("extent", server.extent), given.pop(WINDOW), "extent" in chosen)
    if given:
        chosen["decoding"] = _requested_decoding(server.decoding, given)
    if "given" in chosen and chosen["given"].template:
        chosen["decoding"] = without_speculation(chosen.get("decoding", server.decoding))
    return _suited(replace(server, **chosen), "dlm_")


def request_keys(decoding: Any) -> list[str]:
    """What a request may say to a server that decodes so."""
    own = (f"dlm_{field.name}" for field in fields(decoding))
    return sorted([*METHOD_KEYS, *REQUEST_FIELDS, *GIVEN_KEYS, WINDOW, *own])


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


def _requested_decoding(current: Any, given: Mapping[str, Any]) -> Any:
    """The algorithm and its fields at once, since an algorithm may go with the values that come with it only."""
    cls: Any = type(current)
    values: dict[str, Any] = {}
    if "dlm_algorithm" in given:
        cls, values = _method("decoding", given["dlm_algorithm"], "dlm_algorithm")
    known = {f"dlm_{field.name}": field.name for field in fields(cls)}
    for key, value in given.items():
        if key in known:
            values = values | {known[key]: typed(cls, known[key], value, key)}
        elif key != "dlm_algorithm":
            valid = ", ".join(request_keys(cls))
            raise OptionError(key, f"{short(key)}: {cls.name!r} decoding has no such option, valid are {valid}")
    kept = {field: getattr(current, field) for field in _shared(cls, current) if field not in values}
    if cls is not type(current):
        required = {field.name for field in fields(cls) if "required" in field.metadata}
        kept = {field: value for field, value in kept.items() if value is not None or field not in required}
    try:
        return cls(**(kept | values))
    except ValueError as error:
        key, way_out = f"dlm_{_field_of(error)}", _way_out(cls, kept, values)
        if cls is type(current) or key in given:
            raise OptionError(key, f"dlm_{error}{way_out}") from None
        raise _does_not_go("dlm_algorithm", given["dlm_algorithm"], f"{error}{way_out}") from None


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


def _part(kind: str, given: Any, default: str):
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise OptionError(kind, f"dlm.{kind}: {shown(given)} is not an object with a name and fields")
    given = dict(given)
    name = given.pop("name", default)
    if "preset" in given and isinstance(name, str):
        name = f"{name}/{given.pop('preset')}"
    cls, preset = _method(kind, name, f"dlm.{kind}.name")
    return _built(cls, kind, given, preset)


def _built(cls: Any, part: str, given: Any, preset: Mapping[str, Any]):
    """An object of `cls` from the fields that the server's object gives."""
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise OptionError(part, f"dlm.{part}: {shown(given)} is not an object with fields")
    valid = [field.name for field in fields(cls)]
    for field in given:
        if field not in valid:
            listed = ", ".join(valid) or "none"
            raise OptionError(field, f"dlm.{part}.{field}: not a field of {cls.name!r}, valid fields are {listed}")
    values = {field: typed(cls, field, value, f"dlm.{part}.{field}") for field, value in given.items()}
    try:
        return cls(**{**preset, **values})
    except ValueError as error:
        raise OptionError(f"dlm.{part}.{_field_of(error)}", f"dlm.{part}.{error}") from None


def _named(kind: str, name: Any, key: str, current: Any):
    """Another method by name; fields that both have in common keep their server values."""
    cls, preset = _method(kind, name, key)
    try:
        return cls(**({field: getattr(current, field) for field in _shared(cls, current)} | preset))
    except ValueError as error:
        raise _does_not_go(key, name, error) from None


def _shared(cls: type, current: Any) -> list[str]:
    return [field.name for field in fields(cls) if field.name in {other.name for other in fields(current)}]


def _does_not_go(key: str, name: Any, why: object) -> OptionError:
    return OptionError(key, f"{key}: {shown(name)} does not go with this server's options: {why}")


def _method(kind: str, name: Any, where: str) -> tuple[Any, dict[str, Any]]:
    """The class called `name`, and the field values of its preset if the name is "name/preset"."""
    known = methods(kind)
    method, _, preset = name.partition("/") if isinstance(name, str) else (None, "", "")
    if method not in known:
        raise OptionError(where, f"{where}: {shown(name)} is unknown, valid names are {', '.join(sorted(known))}")
    presets = getattr(known[method], "presets", {})
    if preset and preset not in presets:
        listed = ", ".join(presets) or "none"
        raise OptionError(where, f"{where}: {method!r} has no preset {shown(preset)}, valid presets are {listed}")
    return known[method], presets.get(preset, {})


def _field_of(error: ValueError) -> str:
    return str(error).split(":", 1)[0]
