"""Parses the `dlm_*` options of a request, which override the server's."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from vllm_dlm.methods import methods
from vllm_dlm.options.build import does_not_go, field_of, method_by_name, method_class, shared_fields
from vllm_dlm.options.options import Options, suited
from vllm_dlm.options.scored import SCORE, Scored
from vllm_dlm.options.texts import TEXT_KEYS, CanvasTexts
from vllm_dlm.options.types import OptionError, may_be_unset, typed
from vllm_dlm.plugins.decoding.roles import without_speculation
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
