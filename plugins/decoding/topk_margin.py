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

    @staticmethod
    def score(prob_RV: torch.Tensor, prob_R: torch.Tensor) -> torch.Tensor:
        first_second_R2 = prob_RV.topk(2, dim=-1).values
        return first_second_R2[:, 0] - first_second_R2[:, 1]
