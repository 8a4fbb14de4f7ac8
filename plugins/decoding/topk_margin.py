"""Dream's topk_margin: positions with the largest gap between the two most probable tokens come first.

https://arxiv.org/abs/2508.15487, generation_utils.py of HKUNLP/Dream.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_dlm.plugins.decoding.entropy import Entropy


@dataclass(frozen=True)
class TopkMargin(Entropy):
    name: ClassVar[str] = "topk_margin"
    statistic: ClassVar[str | None] = "margin"

    @staticmethod
    def score(prob_RV: torch.Tensor, prob_R: torch.Tensor) -> torch.Tensor:
        first_R, second_R = prob_RV.topk(2, dim=-1).values.unbind(1)
        return first_R - second_R
