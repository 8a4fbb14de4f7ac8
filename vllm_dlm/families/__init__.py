"""The families of masked-diffusion language models: one folder each, with its record, its reading of config.json
and its names of the tensors. A folder that is here takes part; no list names them.
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
