"""dInfer's hierarchical decoding: a token in each gap splits it into smaller ones.

https://arxiv.org/abs/2510.08666. The masked positions of a block form runs of neighbours. A step fills the most
probable position of each run if its probability exceeds `low`, every position whose probability exceeds `high`, and the
most probable position of the block. Positions that tie within a run are filled together. Tokens and probabilities are
those of `low_confidence`.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vllm_dlm.plugins.decoding.base import Proposal, Random, Turn, check
from vllm_dlm.plugins.decoding.low_confidence import LowConfidence


@dataclass(frozen=True)
class Hierarchy(LowConfidence):
    name: ClassVar[str] = "hierarchy"

    low: float | None = 0.4  # None: the best of each run, at any probability
    high: float | None = 0.9  # None: no such positions

    def __post_init__(self):
        super().__post_init__()
        check(self.low is None or 0 <= self.low <= 1, "low", self.low, "between 0 and 1")
        check(self.high is None or 0 <= self.high <= 1, "high", self.high, "between 0 and 1")

    def choose(self, proposal: Proposal, turn: Turn, rng: Random) -> np.ndarray:
        prob, position = proposal.prob, turn.positions
        starts = np.flatnonzero(np.diff(position, prepend=position[0] - 2) > 1)  # first position of each run
        of_run = np.repeat(np.maximum.reduceat(prob, starts), np.diff(starts, append=len(prob)))
        filled = (prob == of_run) & (prob > (-1.0 if self.low is None else self.low))
        if self.high is not None:
            filled |= prob > self.high
        filled[prob.argmax()] = True
        return self.or_probable(np.flatnonzero(filled), prob, turn)
