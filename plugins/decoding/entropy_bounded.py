"""SDAR's entropy-bounded remasking: tokens of the lowest entropy, as long as all of them together stay below a bound.

https://arxiv.org/abs/2510.06303; the idea is that of https://arxiv.org/abs/2505.24857,
whose bound leaves the largest entropy out. What SDAR's generate.py has under
this name cannot run; this is the rule of its engine (JetEngine), which fills
one token at least.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from vllm_dlm.kernels.head_statistics import head_statistics
from vllm_dlm.plugins.decoding.base import LogitRows, Proposal, Random, Turn, check
from vllm_dlm.plugins.decoding.entropy import Entropy
from vllm_dlm.plugins.decoding.low_confidence import LowConfidence


@dataclass(frozen=True)
class EntropyBounded(LowConfidence):
    name: ClassVar[str] = "entropy_bounded"

    eb_threshold: float = 0.35  # in nats, of all tokens that a step fills

    def __post_init__(self):
        super().__post_init__()
        check(self.eb_threshold >= 0, "eb_threshold", self.eb_threshold, "at least 0")

    @classmethod
    def propose(cls, logits_RV: torch.Tensor, rows: LogitRows) -> Proposal:
        if logits_RV.is_cuda and not rows.sampled:
            suppress_R, unlikely_R = rows.options["suppress_eos"], rows.options["confidence_eos_eot_inf"]
            found = head_statistics(logits_RV, rows.mask_id, rows.eos_id, rows.eot_id, suppress_R, unlikely_R, True)
            return Proposal(found.token, found.entropy, found.prob)
        proposal = super().propose(logits_RV, rows)  # what is ruled out is so in place
        prob_RV = logits_RV.softmax(-1)
        return replace(proposal, score=Entropy.score(prob_RV, proposal.prob))

    def choose(self, proposal: Proposal, turn: Turn, rng: Random) -> np.ndarray:
        order = np.argsort(-proposal.score, kind="stable")
        total = np.cumsum(-proposal.score[order])
        chosen = np.sort(order[: max(1, int(np.searchsorted(total, self.eb_threshold)))])
        return self.or_probable(chosen, proposal.prob, turn)
