"""Server options and per-request options: parse, validate, name the field that is wrong.

A server takes one object of three parts, each `{"name": …, **fields}`; a
request may override single decoding fields as `dlm_<field>` and pick another
method by name. Everything here is plain data, so the front-end (to refuse),
the scheduler and the workers (to obey) read a request the same way.
"""

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from vllm_dlm.methods import KINDS, methods

#: per-request names; every other one is `dlm_` + a field of the decoding algorithm
METHOD_KEYS = {"dlm_algorithm": "decoding", "dlm_reuse": "reuse", "dlm_selection": "selection"}


class OptionError(ValueError):
    """A value that cannot be honoured. `field` is what the caller wrote."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Options:
    """One answer to each question; see the classes in plugins/ for the fields."""

    decoding: Any
    reuse: Any
    selection: Any

    @property
    def caches(self) -> bool:
        """Keys and values are written to pages: later steps read them, or the selection does in this one."""
        return self.reuse.caches or self.selection.sparse


def server_options(given: Mapping[str, Any] | None, default_decoding: str) -> Options:
    """The object of `--dlm-config` / `additional_config["dlm"]`."""
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise OptionError("dlm", f"dlm: {given!r} is not an object with the parts {', '.join(KINDS)}")
    for part in given:
        if part not in KINDS:
            raise OptionError(part, f"dlm: unknown part {part!r}, valid parts are {', '.join(KINDS)}")
    default = {"decoding": default_decoding, "reuse": "none", "selection": "none"}
    return Options(**{kind: _part(kind, given.get(kind), default[kind]) for kind in KINDS})


def request_options(server: Options, extra_args: Mapping[str, Any] | None) -> Options:
    """The server's options with a request's `dlm_*` values (`SamplingParams.extra_args`, `vllm_xargs`)."""
    given = {key: value for key, value in (extra_args or {}).items() if key.startswith("dlm_")}
    chosen = {kind: getattr(server, kind) for kind in KINDS}
    for key, kind in METHOD_KEYS.items():
        if key in given:
            chosen[kind] = _named(kind, given.pop(key), key, chosen[kind])
    decoding = chosen["decoding"]
    known = {f"dlm_{field.name}": field.name for field in fields(decoding)}
    for key in given:
        if key not in known:
            valid = ", ".join(sorted([*METHOD_KEYS, *known]))
            raise OptionError(key, f"{key}: {decoding.name!r} decoding has no such option, valid are {valid}")
    values = {known[key]: _typed(type(decoding), known[key], value, key) for key, value in given.items()}
    if values:
        try:
            chosen["decoding"] = replace(decoding, **values)
        except ValueError as error:
            raise OptionError(f"dlm_{_field_of(error)}", f"dlm_{error}") from None
    return Options(**chosen)


def _part(kind: str, given: Any, default: str):
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise OptionError(kind, f"dlm.{kind}: {given!r} is not an object with a name and fields")
    given = dict(given)
    name = given.pop("name", default)
    if "preset" in given and isinstance(name, str):
        name = f"{name}/{given.pop('preset')}"
    cls, preset = _method(kind, name, f"dlm.{kind}.name")
    valid = [field.name for field in fields(cls)]
    for field in given:
        if field not in valid:
            listed = ", ".join(valid) or "none"
            raise OptionError(field, f"dlm.{kind}.{field}: not a field of {cls.name!r}, valid fields are {listed}")
    values = {field: _typed(cls, field, value, f"dlm.{kind}.{field}") for field, value in given.items()}
    try:
        return cls(**(preset | values))
    except ValueError as error:
        raise OptionError(f"dlm.{kind}.{_field_of(error)}", f"dlm.{kind}.{error}") from None


def _named(kind: str, name: Any, key: str, current: Any):
    """Another method by name; fields that both have in common keep their server values."""
    cls, preset = _method(kind, name, key)
    if cls is type(current):
        return replace(current, **preset)
    shared = {field.name for field in fields(cls)} & {field.name for field in fields(current)}
    try:
        return cls(**({field: getattr(current, field) for field in shared} | preset))
    except ValueError as error:
        raise OptionError(key, f"{key}: {name!r} does not go with this server's options: {error}") from None


def _method(kind: str, name: Any, where: str) -> tuple[type, dict[str, Any]]:
    """The class called `name`, and the field values of its preset if the name is "name/preset"."""
    known = methods(kind)
    method, _, preset = name.partition("/") if isinstance(name, str) else (None, "", "")
    if method not in known:
        raise OptionError(where, f"{where}: {name!r} is unknown, valid names are {', '.join(sorted(known))}")
    presets = getattr(known[method], "presets", {})
    if preset and preset not in presets:
        listed = ", ".join(presets) or "none"
        raise OptionError(where, f"{where}: {method!r} has no preset {preset!r}, valid presets are {listed}")
    return known[method], presets.get(preset, {})


def _field_of(error: ValueError) -> str:
    return str(error).split(":", 1)[0]


def _typed(cls: type, field: str, value: Any, where: str) -> Any:
    """`value` as the field's type. HTTP carries booleans as 0/1 and whole floats as integers."""
    hint = typing.get_type_hints(cls)[field]
    accepted = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in accepted:
        return None
    for kind in accepted:
        origin = typing.get_origin(kind) or kind
        if origin is bool and value in (0, 1):
            return bool(value)
        if isinstance(value, bool):
            continue
        if origin is int and isinstance(value, (int, float)) and value == int_or_none(value):
            return int(value)
        if origin is float and isinstance(value, (int, float)) and value == value:
            return float(value)
        if origin in (list, tuple) and isinstance(value, (list, tuple)):
            return tuple(value)
        if origin is str and isinstance(value, str):
            return value
        if origin is typing.Literal and value in typing.get_args(kind):
            return value
    wanted = " or ".join(
        " or ".join(map(repr, typing.get_args(kind))) if typing.get_origin(kind) is typing.Literal
        else getattr(kind, "__name__", str(kind))
        for kind in accepted
    ).replace("NoneType", "null")
    raise OptionError(where, f"{where}: {value!r} is not valid, it must be {wanted}")


def int_or_none(value: float) -> int | None:
    return int(value) if value == value and abs(value) < 2**62 else None
