"""Which vLLM this package may touch, and what it does with any other: nothing, said once.

Nothing here needs vLLM's private API to be as it was read.
"""

import functools
import logging
import os

from vllm_dlm import __version__
from vllm_dlm.families import FAMILIES

#: from the first to before the second; the signatures of each are in tests/integration/vllm_signatures
SUPPORTED = (0, 32), (0, 34)
#: environment variable with the warnings a server has given: the processes it starts need not repeat them
SAID = "DLM_SAID"


def version_problem() -> str | None:
    import vllm
    from packaging.version import Version

    first, end = SUPPORTED
    if first <= Version(vllm.__version__).release[:2] < end:
        return None
    known = " and ".join(f"{first[0]}.{minor}" for minor in range(first[1], end[1]))
    return f"it supports vLLM {known}, and this is {vllm.__version__}"


def warn_once(line: str) -> None:
    """Once per server, whatever number of processes it has."""
    said = os.environ.get(SAID, "").splitlines()
    if line not in said:
        os.environ[SAID] = "\n".join([*said, line])
        logging.getLogger(f"vllm.{__name__}").warning(line)


def disable(problem: str) -> None:
    """Registers nothing: model types of diffusion models may be served by this vLLM or by another plugin."""
    line = f"vllm_dlm {__version__} is inactive: {problem}. vLLM runs as if it were not installed."
    warn_once(line)
    refuse_fallback(line)


def refuse_fallback(line: str) -> None:
    """The one exception. With `trust_remote_code`, vLLM's Transformers backend takes the code of an architecture that
    nothing serves for an autoregressive model: a diffusion model would be decoded wrongly without an error. Read in
    vLLM 0.32: model_executor/models/registry.py."""
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
