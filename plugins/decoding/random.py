"""LLaDA's random remasking: the quota is filled at random positions of the block.

https://arxiv.org/abs/2502.09992, generate.py of ML-GSAI/LLaDA.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_dlm.plugins.decoding.base import LogitRows
from vllm_dlm.plugins.decoding.low_confidence import LowConfidence
from vllm_dlm.plugins.decoding.roles import RandomOrder


@dataclass(frozen=True)
class Random(RandomOrder, LowConfidence):
    name: ClassVar[str] = "random"

    @staticmethod
    def score(prob_R: torch.Tensor, rows: LogitRows) -> torch.Tensor:
        return rows.uniform()
