"""A commit: what one step did to a canvas. The worker makes it and the scheduler applies it to its own copy."""

from dataclasses import dataclass, field

import numpy as np

NOTHING = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Commit:
    read: np.ndarray  # [C] positions whose logits were read, ascending
    confidence: np.ndarray  # [C] probability of the token proposed for each
    filled: np.ndarray  # [F] indices into `read`, ascending
    tokens: np.ndarray  # [F]
    revoked: np.ndarray = field(default_factory=lambda: NOTHING)  # positions whose tokens become masks, ascending
    left: int = 0  # number of positions that were handed out with it
    logprobs: list | None = None  # of a step that read a starting text: see Canvas.logprobs

    @property
    def positions(self) -> np.ndarray:
        """[F] positions that get a token"""
        return self.read[self.filled]

    @property
    def changed(self) -> np.ndarray:
        """Positions that hold another token than before, ascending"""
        return np.union1d(self.positions, self.revoked) if len(self.revoked) else self.positions
