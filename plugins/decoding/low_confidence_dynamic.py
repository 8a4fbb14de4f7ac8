"""Dynamic remasking of SDAR and LLaDA2.0: fills all tokens above a threshold, and at least the step's share.

https://arxiv.org/abs/2510.06303, https://arxiv.org/abs/2512.15745. If fewer tokens than the step's share of the block
are above the threshold, the most probable tokens up to the share are filled.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vllm_dlm.plugins.decoding.base import Proposal, Random, Turn, best, required
from vllm_dlm.plugins.decoding.low_confidence_static import LowConfidenceStatic


@dataclass(frozen=True)
class LowConfidenceDynamic(LowConfidenceStatic):
    name: ClassVar[str] = "low_confidence_dynamic"
    presets: ClassVar[dict[str, dict]] = {"sdar": {"threshold": 0.9}, "llada2": {"threshold": 0.95}}

    threshold: float | None = required(0.9)

    def choose(self, proposal: Proposal, turn: Turn, rng: Random) -> np.ndarray:
        share = self.share(turn)
        if self.threshold is not None:
            sure = np.flatnonzero(proposal.prob > self.limit(turn))
            if len(sure) >= share and len(sure):
                return sure
        return best(proposal.prob, max(share, 1))
