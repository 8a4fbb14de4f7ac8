"""The tiny checkpoint of each architecture, and engines that serve it with either attention."""

import json

from tests.conftest import GOLDEN
from vllm_dlm.families import FAMILIES

#: architecture -> a tiny checkpoint
TINY = {
    architecture: path.parent.name
    for path in sorted((GOLDEN / "checkpoints").glob("*-tiny/config.json"))
    for architecture in json.loads(path.read_text())["architectures"]
}
#: (tiny checkpoint, attention) of each family that has one
SERVED = [
    (TINY[family.architecture], attention)
    for family in {family.architecture: family for family in FAMILIES.values()}.values()
    if family.architecture in TINY
    for attention in dict.fromkeys((family.attention, family.with_block_size.get("attention", family.attention)))
]


def overrides(checkpoint: str, attention: str) -> dict:
    """For `hf_overrides`. A2D's config.json does not say how wide its blocks are, or whether there are any."""
    config = json.loads((GOLDEN / "checkpoints" / checkpoint / "config.json").read_text())
    (family,) = {FAMILIES[name].architecture for name in config["architectures"]}
    return {"block_size": 4} if attention != FAMILIES[family].attention else {}


def engine(engines, checkpoint: str, attention: str):
    given = overrides(checkpoint, attention)
    return engines(checkpoint, **({"hf_overrides": given} if given else {}))
