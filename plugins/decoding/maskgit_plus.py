"""Dream's maskgit_plus: the most probable tokens are committed first.

https://arxiv.org/abs/2508.15487, generation_utils.py of HKUNLP/Dream.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_dlm.plugins.decoding.entropy import Entropy


@dataclass(frozen=True)
class MaskgitPlus(Entropy):
    name: ClassVar[str] = "maskgit_plus"
    statistic: ClassVar[str | None] = "prob"

    @staticmethod
    def score(prob_RV: torch.Tensor, prob_R: torch.Tensor) -> torch.Tensor:
        return prob_R
