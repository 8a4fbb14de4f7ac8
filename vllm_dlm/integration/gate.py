"""Supported versions of vLLM. With any other version the plugin disables itself with one warning.

This module does not depend on vLLM's private interfaces.
"""

import functools
import logging
import os

from vllm_dlm import __version__
from vllm_dlm.families import FAMILIES

#: first supported version, and first unsupported one after it; tests/integration/vllm_signatures has the signatures
SUPPORTED = (0, 32), (0, 34)
#: environment variable with the warnings that a server has logged, so that its child processes do not repeat them
SAID = "DLM_SAID"


def version_problem() -> str | None:
    import vllm
    from packaging.version import Version

    first, end = SUPPORTED
    if first <= Version(vllm.__version__).release[:2] < end:
        return None
    known = " and ".join(f"{first[0]}.{minor}" for minor in range(first[1], end[1]))
    return f"it supports vLLM {known}, not {vllm.__version__}"


def warn_once(line: str) -> None:
    """Logs a warning once per server, for any number of processes."""
    said = os.environ.get(SAID, "").splitlines()
    if line not in said:
        os.environ[SAID] = "\n".join([*said, line])
        logging.getLogger(f"vllm.{__name__}").warning(line)


def disable(problem: str) -> None:
    """Registers nothing, because this vLLM or another plugin may serve the model types of diffusion models."""
    line = f"vllm_dlm {__version__} is inactive: {problem}. vLLM runs without it."
    warn_once(line)
    refuse_fallback(line)


def refuse_fallback(line: str) -> None:
    """The only patch of a disabled plugin: rejects diffusion models in vLLM's Transformers backend. With
    `trust_remote_code`, it treats any unknown architecture as autoregressive and would silently decode a diffusion
    model incorrectly. Read in vLLM 0.32: model_executor/models/registry.py."""
    try:
        from vllm.model_executor.models import ModelRegistry

        resolve = type(ModelRegistry)._try_resolve_transformers
    except (ImportError, AttributeError):
        return  # no such fallback
    if hasattr(resolve, "_dlm_inactive"):
        return

    @functools.wraps(resolve)
    def resolve_autoregressive(*args, **kwargs):
        found = resolve(*args, **kwargs)
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, str)]
        for architecture in FAMILIES.keys() & given if found is not None else ():
            raise ValueError(
                f"{architecture}: vLLM's Transformers backend would serve this masked-diffusion language model as an "
                f"autoregressive one. {line}"
            )
        return found

    vars(resolve_autoregressive)["_dlm_inactive"] = True
    type(ModelRegistry)._try_resolve_transformers = resolve_autoregressive
