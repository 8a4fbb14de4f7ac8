"""Dream's origin: an independent coin toss decides for every masked position whether to fill it, as in training.

https://arxiv.org/abs/2508.15487, generation_utils.py of HKUNLP/Dream.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vllm_dlm.plugins.decoding.base import Proposal, Random, Turn, check
from vllm_dlm.plugins.decoding.maskgit_plus import MaskgitPlus
from vllm_dlm.plugins.decoding.roles import RandomOrder


@dataclass(frozen=True)
class Origin(RandomOrder, MaskgitPlus):
    name: ClassVar[str] = "origin"

    def __post_init__(self):
        super().__post_init__()
        check(
            self.algorithm_temperature == 0,
            "algorithm_temperature",
            self.algorithm_temperature,
            "0: origin does not rank positions",
        )

    def quotas(self, masks: int, steps: int) -> list[int]:
        # A toss may fill nothing, so every step is run; the quotas only count the steps.
        return [1] * steps

    def choose(self, proposal: Proposal, turn: Turn, rng: Random) -> np.ndarray:
        candidates = np.arange(len(proposal.score))
        if turn.last:
            return candidates
        times = self.times(turn.steps)
        fill = float(1 - times[turn.step + 1] / times[turn.step])
        return candidates[rng().random(len(candidates)) < fill]
