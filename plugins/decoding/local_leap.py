"""LocalLeap: less probable tokens are accepted near a token of high confidence.

https://arxiv.org/abs/2510.07081. Every masked position whose probability
reaches kappa is an anchor and is filled. Positions within W positions of an
anchor are filled if their probability reaches the lower tau. Without an anchor,
only the most probable position is filled. Tokens and probabilities are those of
`low_confidence`.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vllm_dlm.plugins.decoding.base import Proposal, Random, Turn, best, check
from vllm_dlm.plugins.decoding.low_confidence import LowConfidence


@dataclass(frozen=True)
class LocalLeap(LowConfidence):
    name: ClassVar[str] = "local_leap"

    kappa: float = 0.9  # probability of an anchor
    tau: float = 0.75  # probability of a position near an anchor
    radius: int = 4  # W: maximum distance from an anchor, in positions of the canvas

    def __post_init__(self):
        super().__post_init__()
        check(0 <= self.kappa <= 1, "kappa", self.kappa, "between 0 and 1")
        check(0 <= self.tau <= 1, "tau", self.tau, "between 0 and 1")
        check(self.radius >= 0, "radius", self.radius, "at least 0")

    def choose(self, proposal: Proposal, turn: Turn, rng: Random) -> np.ndarray:
        prob, position = proposal.prob, turn.positions
        anchors = position[prob >= self.kappa]
        if not len(anchors):
            return self.or_probable(best(prob, 1), prob, turn)
        # the nearest anchors before and after each position
        after = np.searchsorted(anchors, position).clip(max=len(anchors) - 1)
        before = (after - 1).clip(min=0)
        distance = np.minimum(abs(anchors[before] - position), abs(anchors[after] - position))
        leaps = (distance <= self.radius) & (prob >= self.tau)
        return self.or_probable(np.flatnonzero((prob >= self.kappa) | leaps), prob, turn)
