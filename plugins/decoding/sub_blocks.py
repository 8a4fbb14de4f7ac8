"""Fast-dLLM v2's sub-blocks: fills the parts of a canvas block from left to right.

https://arxiv.org/abs/2509.26328. In the first sub-block with masks, a step
fills the most probable token and all tokens above the threshold. Sub-blocks begin
at multiples of their width.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vllm_dlm.plugins.decoding.base import Proposal, Random, Turn, best, check
from vllm_dlm.plugins.decoding.low_confidence import LowConfidence


@dataclass(frozen=True)
class SubBlocks(LowConfidence):
    name: ClassVar[str] = "sub_blocks"

    sub_block_length: int = 8

    def __post_init__(self):
        super().__post_init__()
        check(self.sub_block_length >= 1, "sub_block_length", self.sub_block_length, "a whole number of at least 1")

    def choose(self, proposal: Proposal, turn: Turn, rng: Random) -> np.ndarray:
        place = turn.positions // self.sub_block_length
        inside = np.flatnonzero(place == place[0])
        prob = proposal.prob[inside]
        chosen = best(prob, 1 if self.thresholded else turn.quota)
        if self.threshold is not None:
            chosen = np.union1d(chosen, np.flatnonzero(prob > self.limit(turn)))
        elif self.thresholded:
            chosen = self.probable(prob, turn)
        return inside[chosen]
