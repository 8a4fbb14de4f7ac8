"""Which vLLM this package may touch, and what it does beside any other: nothing, said once, and no canvas served.

Nothing here needs vLLM's private API.
"""

import logging
import os

from vllm_dlm import __version__
from vllm_dlm.families import FAMILIES

#: from the first to before the second; the signatures of each are in tests/integration/vllm_signatures
SUPPORTED = (0, 32), (0, 34)
#: of this environment variable: the processes a server starts need not say it again
SAID = "DLM_INACTIVE"


def version_problem() -> str | None:
    import vllm
    from packaging.version import Version

    first, end = SUPPORTED
    if first <= Version(vllm.__version__).release[:2] < end:
        return None
    known = " and ".join(f"{first[0]}.{minor}" for minor in range(first[1], end[1]))
    return f"it knows vLLM {known}, and this is {vllm.__version__}"


def stand_aside(problem: str) -> None:
    """Autoregressive models are served as if this package were not there. Where nobody knows a canvas, a diffusion
    model might still be served as one of those, wrongly: reading its config.json is refused."""
    line = (
        f"vllm_dlm {__version__} is inactive: {problem}. "
        "Autoregressive models are served without it, masked-diffusion language models are refused."
    )
    if os.environ.get(SAID) != line:
        os.environ[SAID] = line
        logging.getLogger(f"vllm.{__name__}").warning(line)
    from transformers import AutoConfig

    for model_type in {family.model_type for family in FAMILIES.values()}:
        AutoConfig.register(model_type, refused_config(model_type, line), exist_ok=True)


def refused_config(of_type: str, line: str) -> type:
    from transformers import PretrainedConfig

    class RefusedConfig(PretrainedConfig):
        model_type = of_type

        @classmethod
        def from_dict(cls, config_dict, **kwargs):
            raise ValueError(line)

    return RefusedConfig
