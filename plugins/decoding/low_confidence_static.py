"""SDAR's low-confidence remasking: each step fills its share of the block, the most probable tokens first.

https://arxiv.org/abs/2510.06303, evaluation loop of JetAstra/SDAR. Shares are computed from the block's width, even if
the block begins inside the prompt, so no mask is left after `steps` steps.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vllm_dlm.plugins.decoding.base import Proposal, Random, Turn, best
from vllm_dlm.plugins.decoding.low_confidence import LowConfidence


@dataclass(frozen=True)
class LowConfidenceStatic(LowConfidence):
    name: ClassVar[str] = "low_confidence_static"

    def block_steps(self, block: int, num_blocks: int, masks: int) -> int:
        return self.steps or max(masks, 1)

    def share(self, turn: Turn) -> int:
        """Number of positions that this step fills."""
        if self.steps is None or self.block_length is None:
            return 1
        share, rest = divmod(self.block_length, self.steps)
        return share + (turn.step < rest)

    def choose(self, proposal: Proposal, turn: Turn, rng: Random) -> np.ndarray:
        chosen = best(proposal.prob, max(self.share(turn), 1))
        return self.or_probable(chosen, proposal.prob, turn)
