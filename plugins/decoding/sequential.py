"""SDAR's sequential remasking: each step fills its share of the block from the left.

https://arxiv.org/abs/2510.06303, evaluation loop of JetAstra/SDAR.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vllm_dlm.plugins.decoding.base import Proposal, Random, Turn
from vllm_dlm.plugins.decoding.low_confidence_static import LowConfidenceStatic


@dataclass(frozen=True)
class Sequential(LowConfidenceStatic):
    name: ClassVar[str] = "sequential"

    def choose(self, proposal: Proposal, turn: Turn, rng: Random) -> np.ndarray:
        chosen = np.arange(min(max(self.share(turn), 1), len(proposal.prob)))
        return self.or_probable(chosen, proposal.prob, turn)
