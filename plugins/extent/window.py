"""Suffix window of Streaming-dLLM and DPad: after the current block, only the next few masks and the last one remain.

https://arxiv.org/abs/2601.17917, https://arxiv.org/abs/2508.14148. While a block
that ends before e is decoded, positions 0 … e+W-1 have rows. If positions are
left out, the canvas's last position has a row, too, which tells the model how
long the answer may become. Positions in between cost nothing, and a canvas much
longer than the answer does not degrade it. With W as long as the canvas, this
is `full`.
"""

from dataclasses import dataclass
from typing import ClassVar

from vllm_dlm.plugins.decoding.base import check
from vllm_dlm.plugins.extent.base import Extent


@dataclass(frozen=True)
class Window(Extent):
    name: ClassVar[str] = "window"
    #: published for LLaDA-1.5, LLaDA-Instruct and Dream-Base at 512 tokens
    presets: ClassVar[dict[str, dict]] = {
        "llada-humaneval": {"window": 96},
        "llada-mbpp": {"window": 96},
        "llada-gsm8k": {"window": 96},
        "llada-math": {"window": 96},
        "dream-mbpp": {"window": 192},
        "dream-gsm8k": {"window": 32},
        "dream-math": {"window": 32},
    }
    grows: ClassVar[bool] = True

    window: int = 96  # W

    def __post_init__(self):
        check(self.window >= 0, "window", self.window, "at least 0")

    def rows(self, end: int, length: int) -> int:
        return min(end + self.window + 1, length)

    def last(self, end: int, length: int) -> int:
        return length - 1
