"""RND1's order: positions with the lowest entropy first, at a linear schedule.

https://github.com/RadicalNumerics/RND1, sampling.py. After step n of N, the share
1 - n/N of the masks is left, computed in float32 as in the reference. With
`eb_gamma`, a step fills the longest run of most probable tokens for which the sum
of entropies without the largest one is at most `eb_gamma`
(https://arxiv.org/abs/2505.24857).
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from vllm_dlm.plugins.decoding.base import LogitRows, Proposal, Random, Turn, check
from vllm_dlm.plugins.decoding.entropy import Entropy


@dataclass(frozen=True)
class EntropySchedule(Entropy):
    name: ClassVar[str] = "entropy_schedule"
    statistic: ClassVar[str | None] = "entropy"

    order_temperature: float = 1.0  # temperature of the entropy if the request's is 0
    eb_gamma: float | None = None  # in nats

    def __post_init__(self):
        super().__post_init__()
        check(self.order_temperature > 0, "order_temperature", self.order_temperature, "greater than 0")
        check(self.eb_gamma is None or self.eb_gamma >= 0, "eb_gamma", self.eb_gamma, "at least 0")

    def quotas(self, masks: int, steps: int) -> list[int]:
        if self.thresholded:
            return super().quotas(masks, steps)
        if self.eb_gamma is not None:
            return [1] * steps  # a step may fill more; only the number of steps is used
        shares = np.arange(steps - 1, -1, -1, dtype=np.float64) / steps
        kept = (np.float32(masks) * shares.astype(np.float32)).astype(np.int64)  # [steps] masks left after each step
        quotas = -np.diff(kept, prepend=masks)
        return [int(quota) for quota in quotas if quota]

    @classmethod
    def propose(cls, logits_RV: torch.Tensor, rows: LogitRows) -> Proposal:
        temperature_R = torch.where(rows.temperature == 0, rows.options["order_temperature"], 1.0)
        return super().propose(logits_RV.div_(temperature_R.unsqueeze(1)), rows)

    def choose(self, proposal: Proposal, turn: Turn, rng: Random) -> np.ndarray:
        if self.eb_gamma is None or self.thresholded:
            return super().choose(proposal, turn, rng)
        if turn.last:
            return np.arange(len(proposal.prob))
        order = np.argsort(-proposal.prob, kind="stable")
        entropy = -proposal.score[order].astype(np.float64)
        bounded = np.cumsum(entropy) - np.maximum.accumulate(entropy) <= self.eb_gamma
        return order[: max(1, int(np.argmin(bounded)) if not bounded.all() else len(order))]
