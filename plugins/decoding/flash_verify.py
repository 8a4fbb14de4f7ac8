"""Flash-dLLM's decoding: fills probable tokens in a window of masks, and proposes others that the next step verifies.

https://arxiv.org/abs/2609.26796. The window is the first masks of the canvas block, by
default of the whole response. A step fills its most probable token and all tokens
above the threshold. The most probable other tokens are drafts: the next step reads the
probability of each, given the drafts before it, and fills the first drafts as long as
the product of these probabilities is at least `verify_threshold`. The published code
verifies in a forward of its own; here drafts take part in the next forward
(canvas/verification.py).
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from vllm_dlm.plugins.decoding.base import LogitRows, Memory, Proposal, Random, Turn, best, check
from vllm_dlm.plugins.decoding.held import HeldTokens, held_probability
from vllm_dlm.plugins.decoding.low_confidence import LowConfidence
from vllm_dlm.plugins.decoding.roles import EndStopDecoding, VerifyingDecoding


@dataclass(frozen=True)
class FlashVerify(VerifyingDecoding, EndStopDecoding, LowConfidence):
    name: ClassVar[str] = "flash_verify"
    presets: ClassVar[dict[str, dict]] = {
        "gsm8k": {},
        "mbpp": {},
        "math": {"verify_threshold": 0.85},
        "humaneval": {"verify_threshold": 0.85},
    }

    block_length: int | None = None
    threshold: float | None = 0.9
    window_length: int = 16  # masks that a step may fill; half of them may be drafts
    verify_threshold: float = 0.8  # gamma
    end_stop: bool = True  # all positions after the first end token become that token

    def __post_init__(self):
        super().__post_init__()
        check(self.steps is None, "steps", self.steps, "unset: flash_verify fills probable tokens")
        check(self.window_length >= 1, "window_length", self.window_length, "a whole number of at least 1")
        check(0 <= self.verify_threshold <= 1, "verify_threshold", self.verify_threshold, "between 0 and 1")

    @property
    def most_drafts(self) -> int:
        return self.window_length // 2

    def memory(self) -> Memory:
        return HeldTokens()

    @classmethod
    def propose(cls, logits_RV: torch.Tensor, rows: LogitRows) -> Proposal:
        noted = held_probability(logits_RV, rows)
        return replace(super().propose(logits_RV, rows), noted=noted)

    def choose(self, proposal: Proposal, turn: Turn, rng: Random) -> np.ndarray:
        prob = proposal.prob[: self.window_length]
        return self.probable(prob, turn) if self.thresholded else best(prob, 1)

    def drafts(self, prob: np.ndarray, filled: np.ndarray) -> np.ndarray:
        rest = np.setdiff1d(np.arange(min(len(prob), self.window_length)), filled)
        return rest[best(prob[rest], self.most_drafts)]

    def accepted(self, prob: np.ndarray) -> int:
        return int((np.cumprod(prob) >= self.verify_threshold).sum())
