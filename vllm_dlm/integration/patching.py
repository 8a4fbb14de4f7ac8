"""Rows of the tables in patches.py, and functions that apply them.

A wrapper takes vLLM's function and returns its replacement. A row has the signatures for which its wrapper was written,
so that incompatible versions of vLLM are detected.
"""

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any, Literal

import vllm

from vllm_dlm.integration.signatures import in_source, of_function


@dataclass(frozen=True)
class Patch:
    owner: str  # "module:Class", or "module"
    name: str
    wrapper: Callable[[Callable], Callable]
    why: str
    signatures: tuple[str, ...]  # accepted signatures, see signatures.py
    #: when to apply it: when the process starts; when a server imports the owner; in workers that request it
    at: Literal["start", "import", "worker"] = "start"

    @property
    def module(self) -> str:
        return self.owner.partition(":")[0]


@dataclass(frozen=True)
class Write:
    """Attributes of vLLM's objects that this package assigns"""

    owner: str  # "module:Class", or "module"
    names: tuple[str, ...]
    file: str  # the assigning file in vllm_dlm
    why: str


#: attribute that marks replacements of vLLM's functions
INSTALLED = "_dlm"


def wrap(patch: Patch) -> None:
    """Installs the wrapper once."""
    owner, original = _found(patch)
    kind = type(original) if isinstance(original, (staticmethod, classmethod)) else None
    function = original.__func__ if kind else original
    if getattr(function, INSTALLED, False):
        return
    wrapped = functools.wraps(function)(patch.wrapper(function))
    vars(wrapped)[INSTALLED] = True
    setattr(owner, patch.name, kind(wrapped) if kind else wrapped)


def mismatch(patch: Patch) -> str | None:
    """Describes a mismatch between vLLM and the wrapper, or returns None. An owner that is not imported yet is checked
    by its source."""
    place, signature, why = f"{patch.owner}.{patch.name}", None, ""
    if patch.at == "start" or patch.module in sys.modules:
        try:
            _, found = _found(patch)
            signature = of_function(getattr(found, "__func__", found))
        except (ImportError, AttributeError) as error:
            why = f" ({error})"
    else:
        signature = in_source(Path(vllm.__path__[0]), patch.owner, patch.name)
    if signature is None:
        return f"{place} does not exist{why}"
    return None if signature in patch.signatures else f"{place} has the signature {signature}"


class WhenImported(MetaPathFinder):
    """Patches owners when they are imported. Importing modules that only servers need would slow down all other
    processes."""

    def __init__(self, late: dict[str, list[Patch]]):
        self.late = late

    def find_spec(self, name: str, path=None, target=None):
        if (patches := self.late.pop(name, None)) is None:
            return None
        spec = importlib.util.find_spec(name)  # found by other finders, because the name was removed from `late`
        loader: Any = spec and spec.loader
        execute = loader.exec_module

        def execute_and_patch(module):
            execute(module)
            for patch in patches:
                wrap(patch)

        loader.exec_module = execute_and_patch
        return spec


def owner_of(patch: Patch) -> Any:
    _, _, cls = patch.owner.partition(":")
    module = importlib.import_module(patch.module)
    return getattr(module, cls) if cls else module


def _found(patch: Patch) -> tuple[Any, Any]:
    owner = owner_of(patch)
    return owner, inspect.getattr_static(owner, patch.name)
