"""What a launch of Triton kernels is to PyTorch: one operator of the namespace `vllm_dlm`.

Fake tensors pass through it and get their shapes, modes that watch operators
see one name, and compilers find nothing to look into. It is registered without
`torch.library.custom_op`, whose calls take 29 microseconds of the host instead
of 4 (of a body that does nothing): a denoising step makes hundreds of them.
"""

import importlib
from collections.abc import Callable

import torch

NAMESPACE = "vllm_dlm"
#: what launches the operator of a name; those of folders that have been imported
LAUNCHERS: dict[str, Callable] = {}
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def operator(schema: str, package: str, fake: Callable) -> Callable:
    """The operator that runs the function of its name in the package's triton.py. That is imported by the first
    launch, so that Triton need not exist where nothing is launched. `fake` makes outputs of the right shapes."""
    name = schema.partition("(")[0]
    launcher: Callable | None = None

    def launch(*args):
        nonlocal launcher
        if launcher is None:
            launcher = getattr(importlib.import_module(f"{package}.triton"), name)
        return launcher(*args)

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, launch, "CUDA")  # AMD's devices have this name, too
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    LAUNCHERS[name] = launch
    return getattr(getattr(torch.ops, NAMESPACE), name).default
