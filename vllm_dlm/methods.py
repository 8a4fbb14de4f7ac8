"""Finds the methods: every class with a `name` in plugins/<kind>/, and whatever other packages register.

A package adds a method without touching this one by naming its class in the
entry-point group `vllm_dlm.methods`; the class's base decides its kind.
"""

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points

KINDS = ("decoding", "reuse", "selection")


@cache
def methods(kind: str) -> dict[str, type]:
    """name -> dataclass of every known method of a kind."""
    package = importlib.import_module(f"vllm_dlm.plugins.{kind}")
    found = [
        member
        for module in pkgutil.iter_modules(package.__path__)
        for member in vars(importlib.import_module(f"{package.__name__}.{module.name}")).values()
    ]
    found += [point.load() for point in entry_points(group="vllm_dlm.methods")]
    return {
        cls.name: cls
        for cls in found
        if isinstance(cls, type) and issubclass(cls, package.BASE) and getattr(cls, "name", None)
    }
