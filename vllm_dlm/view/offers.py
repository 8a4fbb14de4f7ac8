"""Options that the page offers: methods that this server accepts, and its default methods."""

from dataclasses import fields
from typing import Any

from vllm_dlm.methods import KINDS, methods
from vllm_dlm.options import METHOD_KEYS, OptionError, Options, request_options


def offers(server: Options) -> dict[str, Any]:
    """kind -> names and name/preset that this server accepts in requests; "server" -> its own methods and fields."""
    keys = {kind: key for key, kind in METHOD_KEYS.items()}
    taken: dict[str, Any] = {
        kind: [name for name in _names(kind) if _takes(server, keys[kind], name)] for kind in KINDS
    }
    return taken | {"server": {kind: _described(getattr(server, kind)) for kind in KINDS}}


def _names(kind: str) -> list[str]:
    """Names of methods, each followed by its presets"""
    known = methods(kind)
    return [
        name for method in known for name in (method, *(f"{method}/{p}" for p in getattr(known[method], "presets", {})))
    ]


def _takes(server: Options, key: str, name: str) -> bool:
    try:
        request_options(server, {key: name})
    except OptionError:
        return False
    return True


def _described(method: Any) -> dict[str, Any]:
    return {"name": method.name} | {field.name: getattr(method, field.name) for field in fields(method)}
