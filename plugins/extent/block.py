"""dLLM-Var's extent: the canvas ends with the current block and grows by one block at a time.

https://arxiv.org/abs/2510.24605. Models must be trained for it, because they do
not know the length of the answer in advance.
"""

from dataclasses import dataclass
from typing import ClassVar

from vllm_dlm.plugins.extent.base import Extent


@dataclass(frozen=True)
class Block(Extent):
    name: ClassVar[str] = "block"
    grows: ClassVar[bool] = True

    def rows(self, end: int, length: int) -> int:
        return end
