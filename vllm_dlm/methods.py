"""Registry of methods: all classes with a `name` in plugins/<kind>/, and classes registered by other packages.

Another package registers a method by listing its class in the entry-point group
`vllm_dlm.methods`. The base class determines its kind.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from typing import Any

KINDS = ("decoding", "reuse", "selection", "extent")
GROUP = "vllm_dlm.methods"


@cache
def methods(kind: str) -> dict[str, type]:
    """name -> dataclass, for all known methods of a kind."""
    base = _package(kind).BASE
    known: dict[str, type] = {}
    for cls in filter(_is_named_type, (*_bundled(kind), *_registered())):
        if issubclass(cls, base) and known.setdefault(cls.name, cls) is not cls:
            both = f"{_place(known[cls.name])} and {_place(cls)}"
            raise ValueError(f"{kind}: {cls.name!r} is the name of two methods, {both}")
    return known


def _bundled(kind: str) -> Iterator[Any]:
    package = _package(kind)
    for module in pkgutil.iter_modules(package.__path__):
        yield from vars(importlib.import_module(f"{package.__name__}.{module.name}")).values()


def _registered() -> Iterator[type]:
    bases = tuple(_package(kind).BASE for kind in KINDS)
    for point in entry_points(group=GROUP):
        cls = point.load()
        if not (_is_named_type(cls) and issubclass(cls, bases)):
            wanted = " or ".join(base.__name__ for base in bases)
            raise ValueError(f"{GROUP}: {point.name} = {point.value} is not a {wanted} with a name")
        yield cls


def _is_named_type(thing: Any) -> bool:
    return isinstance(thing, type) and bool(getattr(thing, "name", None))


def _package(kind: str) -> Any:
    return importlib.import_module(f"vllm_dlm.plugins.{kind}")


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
