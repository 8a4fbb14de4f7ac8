"""dLLM-Var's extent: behind the current canvas block nothing exists, and the canvas grows by one block at a time.

https://arxiv.org/abs/2510.24605. Models must be trained for it: the end of the
answer is known only when the model writes it.
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
