"""FreeDave: what the next steps would fill is guessed, and verified in one forward; texts stay what they were.

https://arxiv.org/abs/2510.00294. Beside the canvas D_0 a step looks at drafts
D_1 ... D_(d-1), which fill the 1 ... d-1 most probable masks with what was proposed
for them last. What the step would fill into D_0 is known from its logits; if
that is what a draft has filled, then the logits of this draft are those of the
next step, and so on. Without a threshold one token is filled per step, and the
answer is that of one token per step exactly; with one (FreeDave++) drafts add to
what the threshold fills.

Keys and values outside the canvas block are shared, so drafts need a policy that
recomputes the block alone (`fast_dllm` with its dual cache) and temperature 0;
elsewhere, and where a busy server has no rows left for them, there are none.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vllm_dlm.plugins.decoding.base import Proposal, Random, Turn, best, check
from vllm_dlm.plugins.decoding.low_confidence import LowConfidence
from vllm_dlm.plugins.decoding.roles import SpeculativeDecoding


@dataclass(frozen=True)
class FreeDave(SpeculativeDecoding, LowConfidence):
    name: ClassVar[str] = "freedave"
    presets: ClassVar[dict[str, dict]] = {"llada": {"drafts": 4}, "dream": {"drafts": 8}}

    drafts: int = 4  # d: canvases of a step, the request's own among them

    def __post_init__(self):
        super().__post_init__()
        check(1 <= self.drafts <= 64, "drafts", self.drafts, "between 1 and 64")
        check(self.steps is None, "steps", self.steps, "unset: freedave fills one token per step, or by a threshold")

    def choose(self, proposal: Proposal, turn: Turn, rng: Random) -> np.ndarray:
        return self.or_probable(best(proposal.prob, 1), proposal.prob, turn)
