"""Integration with vLLM's private interfaces outside of the engine.

`patches` lists all changes of vLLM, `overrides` all inherited classes, and `registration` registers the models. The
other modules implement them.
"""

from vllm_dlm.integration.cpu_wheel import alias_distribution
from vllm_dlm.integration.gate import disable, version_problem


def install() -> None:
    """Runs in every vLLM process, possibly more than once. It must not prevent any process from starting."""
    alias_distribution()
    try:
        problem = version_problem() or _install()
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        disable(problem)


def _install() -> str | None:
    """Installs everything or nothing. Returns a problem that prevents it, or None."""
    from vllm_dlm.integration.patches import PATCHES, apply_patches
    from vllm_dlm.integration.patching import mismatch
    from vllm_dlm.integration.registration import register_models

    for patch in PATCHES:
        if (found := mismatch(patch)) is not None:
            return f"in this vLLM {found}"
    register_models()
    apply_patches()
    return None
