"""Families of masked-diffusion language models, one folder each: its record, how its config.json is read, and its
tensor names. Every folder in this package is registered automatically.
"""

import importlib
import pkgutil

from vllm_dlm.families.family import Family

#: architecture -> record
FAMILIES: dict[str, Family] = {}

for _module in pkgutil.iter_modules(__path__, prefix=f"{__name__}."):
    if _module.ispkg:
        _family = importlib.import_module(_module.name).FAMILY
        FAMILIES[_family.architecture] = _family
