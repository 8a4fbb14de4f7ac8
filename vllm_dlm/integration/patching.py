"""How the tables in patches.py are made and applied.

A wrapper is given vLLM's function and returns what takes its place. A row has the signatures for which its wrapper was
written, so that another vLLM is noticed.
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
    signatures: tuple[str, ...]  # any of them is right; see signatures.py
    #: when: as the process starts; once a server imports the owner; in a worker that asks for it
    at: Literal["start", "import", "worker"] = "start"

    @property
    def module(self) -> str:
        return self.owner.partition(":")[0]


@dataclass(frozen=True)
class Write:
    """Attributes of an object of vLLM's that this package sets"""

    owner: str  # "module:Class", or "module"
    names: tuple[str, ...]
    file: str  # in vllm_dlm, where that happens
    why: str


#: attribute of what stands in the place of vLLM's functions
INSTALLED = "_dlm"


def wrap(patch: Patch) -> None:
    """Puts the wrapper in place, unless it is there."""
    owner, original = _found(patch)
    kind = type(original) if isinstance(original, (staticmethod, classmethod)) else None
    function = original.__func__ if kind else original
    if getattr(function, INSTALLED, False):
        return
    wrapped = functools.wraps(function)(patch.wrapper(function))
    vars(wrapped)[INSTALLED] = True
    setattr(owner, patch.name, kind(wrapped) if kind else wrapped)


def mismatch(patch: Patch) -> str | None:
    """What is not as the wrapper expects it. Of an owner that no server has imported, by its source."""
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
        return f"{place} is not there{why}"
    return None if signature in patch.signatures else f"{place} is {signature}"


class WhenImported(MetaPathFinder):
    """Importing what only servers need takes long in every other process: such owners are patched once they came."""

    def __init__(self, late: dict[str, list[Patch]]):
        self.late = late

    def find_spec(self, name: str, path=None, target=None):
        if (patches := self.late.pop(name, None)) is None:
            return None
        spec = importlib.util.find_spec(name)  # by the other finders, since the name is no longer here
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
