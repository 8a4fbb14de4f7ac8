"""Families of masked-diffusion language models, one folder each: its record, how its config.json is read, and its
tensor names. Every folder in this package is registered automatically.
"""

import importlib
import pkgutil
from typing import Any

from vllm_dlm.families.family import Family

#: architecture -> record
FAMILIES: dict[str, Family] = {}

for _module in pkgutil.iter_modules(__path__, prefix=f"{__name__}."):
    if _module.ispkg:
        _family = importlib.import_module(_module.name).FAMILY
        FAMILIES.update(dict.fromkeys(_family.architectures, _family))


def record_of(model_config: Any) -> Family:
    """The record of a model that this plugin serves"""
    return FAMILIES[model_config.architecture].of(model_config.hf_config)
