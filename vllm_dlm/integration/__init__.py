"""Everything that touches vLLM's private API outside the engine, and nothing else.

`patches` is the table of what is changed in vLLM, `overrides` of what is inherited from it, `registration` makes the
models known; the other files hold what those put in place.
"""

from vllm_dlm.integration.cpu_wheel import alias_distribution
from vllm_dlm.integration.gate import disable, version_problem


def install() -> None:
    """Runs in every vLLM process, perhaps more than once, and must not keep any of them from starting."""
    alias_distribution()
    try:
        problem = version_problem() or _install()
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        disable(problem)


def _install() -> str | None:
    """Everything or nothing; what is not as expected."""
    from vllm_dlm.integration.patches import PATCHES, apply_patches
    from vllm_dlm.integration.patching import mismatch
    from vllm_dlm.integration.registration import register_models

    for patch in PATCHES:
        if (found := mismatch(patch)) is not None:
            return f"in this vLLM {found}"
    register_models()
    apply_patches()
    return None
