"""LocalLeap: beside a token that is sure, less sure ones may be believed.

https://arxiv.org/abs/2510.07081. Every masked position whose probability
reaches kappa is an anchor and is filled; so is every one at most W positions
from an anchor whose probability reaches the lower tau. Without an anchor the
most probable position is filled alone. Tokens and probabilities are those of
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
    tau: float = 0.75  # of a position beside one
    radius: int = 4  # W: how far that may be, in positions of the canvas

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
        # of the anchors the nearest one before a position, and the nearest one behind it
        behind = np.searchsorted(anchors, position).clip(max=len(anchors) - 1)
        before = (behind - 1).clip(min=0)
        distance = np.minimum(abs(anchors[before] - position), abs(anchors[behind] - position))
        leaps = (distance <= self.radius) & (prob >= self.tau)
        return self.or_probable(np.flatnonzero((prob >= self.kappa) | leaps), prob, turn)
