"""FreeDave: speculates on the tokens of the next steps and verifies them in the same forward, without changing the
text.

https://arxiv.org/abs/2510.00294. In addition to the canvas D_0, a step reads
speculative canvases D_1 ... D_(d-1), which fill the 1 ... d-1 most probable masks
with the tokens proposed for them last. If the step fills D_0 to equal D_i, the
logits of D_i are those of the next step, and so on.
Without a threshold, each step fills one token and the answer is exactly that of
one token per step. With one (FreeDave++), speculation adds to what the threshold
fills. The dataflow is in canvas/speculation.py.

Keys and values outside the canvas block are shared, so a policy that recomputes
the block alone is needed (`fast_dllm` with its dual cache), and temperature 0.
Otherwise, and if a busy server has no rows left, nothing is speculated.
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

    drafts: int = 4  # d: canvases per step, including the request's own

    def __post_init__(self):
        super().__post_init__()
        check(1 <= self.drafts <= 64, "drafts", self.drafts, "between 1 and 64")
        check(self.steps is None, "steps", self.steps, "unset: freedave fills one token per step, or by a threshold")

    def choose(self, proposal: Proposal, turn: Turn, rng: Random) -> np.ndarray:
        return self.or_probable(best(proposal.prob, 1), proposal.prob, turn)
