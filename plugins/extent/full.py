"""Every position of the canvas has a row in every step: the exact canvas."""

from dataclasses import dataclass
from typing import ClassVar

from vllm_dlm.plugins.extent.base import Extent


@dataclass(frozen=True)
class Full(Extent):
    name: ClassVar[str] = "full"
