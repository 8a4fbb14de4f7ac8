"""Registers each Triton launcher as one PyTorch operator of the namespace `vllm_dlm`.

An operator supports fake tensors, appears under one name in dispatch modes and
profilers, and is opaque to compilers. It is registered without
`torch.library.custom_op`, because its calls cost 29 microseconds of host time instead
of 4 (with an empty body), and a denoising step makes hundreds of calls.
"""

import importlib
from collections.abc import Callable

import torch

NAMESPACE = "vllm_dlm"
#: operator name -> launcher, for the kernel packages imported so far
LAUNCHERS: dict[str, Callable] = {}
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def operator(schema: str, package: str, fake: Callable) -> Callable:
    """Defines the operator `schema`, which runs the function of the same name in the package's triton.py.

    triton.py is imported at the first launch, so Triton is not needed if nothing is launched. `fake` returns outputs
    of the right shapes."""
    name = schema.partition("(")[0]
    launcher: Callable | None = None

    def launch(*args):
        nonlocal launcher
        if launcher is None:
            launcher = getattr(importlib.import_module(f"{package}.triton"), name)
        return launcher(*args)

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, launch, "CUDA")  # PyTorch also uses this key for AMD devices
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    LAUNCHERS[name] = launch
    return getattr(getattr(torch.ops, NAMESPACE), name).default
