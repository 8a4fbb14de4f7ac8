"""Builds methods and other parts of the server's object from names and fields. Errors name the invalid field."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from vllm_dlm.methods import methods
from vllm_dlm.options.types import OptionError, typed
from vllm_dlm.shown import shown


def build_method(kind: str, written: Any, default: str):
    """The method described by a part of the server's object. `default`: name of the method if the part has none"""
    written = {} if written is None else written
    if not isinstance(written, Mapping):
        raise OptionError(kind, f"dlm.{kind}: {shown(written)} is not an object with a name and fields")
    written = dict(written)
    name = written.pop("name", default)
    if "preset" in written and isinstance(name, str):
        name = f"{name}/{written.pop('preset')}"
    cls, preset = method_class(kind, name, f"dlm.{kind}.name")
    return build(cls, kind, written, preset)


def build(cls: Any, part: str, written: Any, preset: Mapping[str, Any]):
    """An object of `cls` with the fields of a part of the server's object."""
    written = {} if written is None else written
    if not isinstance(written, Mapping):
        raise OptionError(part, f"dlm.{part}: {shown(written)} is not an object with fields")
    valid = [field.name for field in fields(cls)]
    for field in written:
        if field not in valid:
            listed = ", ".join(valid) or "none"
            raise OptionError(field, f"dlm.{part}.{field}: not a field of {cls.name!r}, valid fields are {listed}")
    values = {field: typed(cls, field, value, f"dlm.{part}.{field}") for field, value in written.items()}
    try:
        return cls(**{**preset, **values})
    except ValueError as error:
        raise OptionError(f"dlm.{part}.{field_of(error)}", f"dlm.{part}.{error}") from None


def method_by_name(kind: str, name: Any, key: str, current: Any):
    """Another method by name. Fields that both methods have keep the server's values."""
    cls, preset = method_class(kind, name, key)
    try:
        return cls(**({field: getattr(current, field) for field in shared_fields(cls, current)} | preset))
    except ValueError as error:
        raise does_not_go(key, name, error) from None


def shared_fields(cls: type, current: Any) -> list[str]:
    return [field.name for field in fields(cls) if field.name in {other.name for other in fields(current)}]


def does_not_go(key: str, name: Any, why: object) -> OptionError:
    return OptionError(key, f"{key}: {shown(name)} cannot be combined with this server's options: {why}")


def method_class(kind: str, name: Any, where: str) -> tuple[Any, dict[str, Any]]:
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


def field_of(error: ValueError) -> str:
    return str(error).split(":", 1)[0]
