"""CreditDecoding: a token that is proposed again and again earns credit, which adds to its logit.

https://arxiv.org/abs/2510.06133. In each step and for every masked row of the
block, existing credit fades by beta and the row's best token earns p^gamma:

    M <- beta * M,   M[i, argmax_i] += p_i^gamma,   logits + alpha * log(1 + M)

Token and probability are read from the sum. At most one token per row gets its
first credit in a step, so M is stored as at most one (token, credit) pair per
row and step. The pairs stay on the host between steps and are dropped at the
end of the block.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from vllm_dlm.kernels.head_statistics import head_statistics
from vllm_dlm.plugins.decoding.base import LogitRows, Memory, Proposal, Turn, check
from vllm_dlm.plugins.decoding.low_confidence import LowConfidence

#: positions whose probability is within this distance of the best one are filled, too
TIE = np.float32(1e-5)


@dataclass(frozen=True)
class Credit(LowConfidence):
    name: ClassVar[str] = "credit"

    alpha: float = 0.7
    gamma: float = 0.2
    beta: float = 0.8

    def __post_init__(self):
        super().__post_init__()
        check(0 <= self.alpha <= 1e3, "alpha", self.alpha, "between 0 and 1000")
        check(0 <= self.gamma <= 1e3, "gamma", self.gamma, "between 0 and 1000")
        check(0 <= self.beta <= 1, "beta", self.beta, "between 0 and 1")

    def memory(self) -> "Credits":
        return Credits(np.float32(self.beta))

    @classmethod
    def propose(cls, logits_RV: torch.Tensor, rows: LogitRows) -> Proposal:
        token_RK, credit_RK = rows.memory["token"], rows.memory["credit"]  # -1 and 0: padding
        best = head_statistics(logits_RV, rows.mask_id, rows.eos_id, suppress_eos=rows.options["suppress_eos"])
        best_R, earned_R = best.token, best.prob ** rows.options["gamma"]
        again_RK = token_RK == best_R.unsqueeze(1)
        credit_RK = rows.options["beta"].unsqueeze(1) * credit_RK + again_RK * earned_R.unsqueeze(1)
        first_R = earned_R.masked_fill(again_RK.any(1), 0.0)
        token_RK = torch.cat([token_RK.clamp_min(0), best_R.unsqueeze(1)], 1)
        credit_RK = torch.cat([credit_RK, first_R.unsqueeze(1)], 1)
        logits_RV.scatter_add_(1, token_RK, rows.options["alpha"].unsqueeze(1) * credit_RK.log1p())
        noted = torch.stack([best_R.double(), earned_R.double()])
        return replace(super().propose(logits_RV, rows), noted=noted)

    def probable(self, prob: np.ndarray, turn: Turn) -> np.ndarray:
        if self.threshold is None:
            return super().probable(prob, turn)
        return np.flatnonzero(prob >= min(prob.max() - TIE, np.float32(self.limit(turn))))


class Credits(Memory):
    """Credit in one canvas block: position -> token -> credit."""

    noted: ClassVar[int] = 2  # the token that earns credit, and how much

    def __init__(self, beta: np.float32):
        self.beta = beta
        self.of: dict[int, dict[int, np.float32]] = {}

    def columns(self, positions: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
        own = [self.of.get(position, {}) for position in positions.tolist()]
        token = np.full((len(own), max(map(len, own), default=0)), -1, np.int64)
        credit = np.zeros(token.shape, np.float32)
        for row, pairs in enumerate(own):
            token[row, : len(pairs)], credit[row, : len(pairs)] = list(pairs), list(pairs.values())
        return {"token": token, "credit": credit}

    def note(self, positions: np.ndarray, noted: np.ndarray) -> None:
        for pairs in self.of.values():  # including positions that this step did not read
            for known in pairs:
                pairs[known] *= self.beta
        for position, token, earned in zip(positions.tolist(), *noted, strict=True):
            pairs = self.of.setdefault(position, {})
            pairs[int(token)] = pairs.get(int(token), np.float32(0)) + np.float32(earned)
