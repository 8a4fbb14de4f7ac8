"""d3LLM's decoding: fills tokens with low entropy in several open blocks of the response.

https://arxiv.org/abs/2601.07568. A step opens another block if the share `add_at`
of the last open one is filled. A block is active if the share `activate_at` of the
previous one is filled. The first active block with masks gets a token in every
step. Blocks are counted from the start of the canvas block, by default the whole
response. With `add_at` and `activate_at` of 1, blocks are filled one after another.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from vllm_dlm.plugins.decoding.base import LogitRows, Memory, Proposal, Random, Turn, check
from vllm_dlm.plugins.decoding.entropy import Entropy
from vllm_dlm.plugins.decoding.roles import EndStopDecoding

CLOSED, OPEN, FIRST = 0, 1, 2  # FIRST: in the first active block with masks


class OpenBlocks(Memory):
    """Open and active blocks, updated once before each step"""

    noted: ClassVar[int] = 1

    def __init__(self, width: int, add_at: float, activate_at: float):
        self.width, self.add_at, self.activate_at = width, add_at, activate_at
        self.origin: int | None = None  # first position of the first block
        self.sizes = np.zeros(0, np.int64)  # masks of each block at the start
        self.active = [True]  # for each open block

    def columns(self, positions: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
        if self.origin is None:
            self.origin = int(positions[0])
        if before := max(-(-(self.origin - int(positions[0])) // self.width), 0):  # blocks without rows until now
            self.origin -= before * self.width
            self.sizes = np.pad(self.sizes, (before, 0))
            self.active = [True] * before + self.active
        block = (positions - self.origin) // self.width
        left = np.bincount(block, minlength=len(self.sizes))
        # the first steps may read only part of the masks
        self.sizes = np.maximum(np.pad(self.sizes, (0, len(left) - len(self.sizes))), left)
        self._advance(1 - left / np.maximum(self.sizes, 1))
        first = next((index for index, active in enumerate(self.active) if active and left[index]), None)
        state = np.where(block < len(self.active), OPEN, CLOSED)
        return {"state": np.where(block == first, FIRST, state)[:, None]}

    def _advance(self, filled: np.ndarray) -> None:
        """`filled`: filled share of each block"""
        for block in range(1, len(self.active)):
            self.active[block] |= bool(filled[block - 1] >= self.activate_at)
        last = filled[len(self.active) - 1]
        if len(self.active) < len(self.sizes) and last >= self.add_at:
            self.active.append(bool(last >= self.activate_at))


@dataclass(frozen=True)
class MultiBlock(EndStopDecoding, Entropy):
    name: ClassVar[str] = "multi_block"
    statistic: ClassVar[str | None] = "entropy"
    presets: ClassVar[dict[str, dict]] = {
        "llada": {},
        "llada-humaneval": {"add_at": 1.0, "activate_at": 1.0},
        "llada-mbpp": {"max_entropy": 0.4},
        "dream": {"max_entropy": 0.4, "always_one": False},
        "dream-gsm8k": {"max_entropy": 0.45, "always_one": False},
        "dream-humaneval": {"max_entropy": 0.5, "always_one": False},
        "dream-mbpp": {"max_entropy": 0.45, "always_one": False},
        # https://arxiv.org/abs/2509.26488: the same rule, one canvas block after the other
        "dparallel": {"add_at": 1.0, "activate_at": 1.0, "end_stop": False, "block_length": 32},
    }

    open_length: int = 32  # positions of a block
    max_entropy: float = 0.5  # positions with at most this entropy are filled; in nats
    add_at: float = 0.1
    activate_at: float = 0.95
    always_one: bool = True  # at least the open position with the lowest entropy is filled
    end_stop: bool = True  # all positions after the first end token become that token

    def __post_init__(self):
        super().__post_init__()
        check(self.steps is None, "steps", self.steps, "unset: multi_block fills positions with low entropy")
        check(self.open_length >= 1, "open_length", self.open_length, "a whole number of at least 1")
        check(self.max_entropy >= 0, "max_entropy", self.max_entropy, "at least 0")
        for field in ("add_at", "activate_at"):
            check(0 <= getattr(self, field) <= 1, field, getattr(self, field), "between 0 and 1")

    def memory(self) -> Memory:
        return OpenBlocks(self.open_length, self.add_at, self.activate_at)

    @classmethod
    def propose(cls, logits_RV: torch.Tensor, rows: LogitRows) -> Proposal:
        return replace(super().propose(logits_RV, rows), noted=rows.memory["state"].T.double())

    def choose(self, proposal: Proposal, turn: Turn, rng: Random) -> np.ndarray:
        assert proposal.noted is not None
        state, entropy = proposal.noted[0], -proposal.score
        fills = (state != CLOSED) & (entropy <= self.max_entropy)
        if self.threshold is not None:
            fills |= (state != CLOSED) & (proposal.prob >= self.limit(turn))
        for group, wanted in ((state != CLOSED, self.always_one), (state == FIRST, not fills[state == FIRST].any())):
            if wanted and group.any():
                fills[np.where(group, entropy, np.inf).argmin()] = True
        return np.flatnonzero(fills)
