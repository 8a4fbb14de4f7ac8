"""SDAR's entropy-bounded remasking: fills the tokens of lowest entropy while the sum of entropies stays below a bound.

https://arxiv.org/abs/2510.06303, after https://arxiv.org/abs/2505.24857, where the
largest entropy does not count. The version in SDAR's generate.py cannot run, so
this is the rule of SDAR's engine (JetEngine). It fills at least one token.
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

    eb_threshold: float = 0.35  # in nats, for all tokens of a step together

    def __post_init__(self):
        super().__post_init__()
        check(self.eb_threshold >= 0, "eb_threshold", self.eb_threshold, "at least 0")

    @classmethod
    def propose(cls, logits_RV: torch.Tensor, rows: LogitRows) -> Proposal:
        if logits_RV.is_cuda and not rows.sampled:
            suppress_R, unlikely_R = rows.options["suppress_eos"], rows.options["confidence_eos_eot_inf"]
            found = head_statistics(logits_RV, rows.mask_id, rows.eos_id, rows.eot_id, suppress_R, unlikely_R, True)
            return Proposal(found.token, found.entropy, found.prob)
        proposal = super().propose(logits_RV, rows)  # rules tokens out in place
        prob_RV = logits_RV.softmax(-1)
        return replace(proposal, score=Entropy.score(prob_RV, proposal.prob))

    def choose(self, proposal: Proposal, turn: Turn, rng: Random) -> np.ndarray:
        order = np.argsort(-proposal.score, kind="stable")
        total = np.cumsum(-proposal.score[order])
        chosen = np.sort(order[: max(1, int(np.searchsorted(total, self.eb_threshold)))])
        return self.or_probable(chosen, proposal.prob, turn)
