"""A decoding that lives outside of the package, with a field of its own that reaches `propose`."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_dlm.plugins.decoding.base import LogitRows, Proposal, check
from vllm_dlm.plugins.decoding.low_confidence import LowConfidence


@dataclass(frozen=True)
class Calibrated(LowConfidence):
    name: ClassVar[str] = "calibrated"

    calibration: float = 1.0  # temperature at which confidences are read; the tokens are those of low_confidence

    def __post_init__(self):
        super().__post_init__()
        check(self.calibration > 0, "calibration", self.calibration, "greater than 0")

    @classmethod
    def propose(cls, logits_RV: torch.Tensor, rows: LogitRows) -> Proposal:
        token_R = super().propose(logits_RV, rows).token
        prob_RV = (logits_RV / rows.options["calibration"][:, None]).softmax(-1)
        prob_R = prob_RV.gather(1, token_R[:, None])[:, 0]
        return Proposal(token_R, prob_R, prob_R)
