"""A commit: the changes of one step to a canvas. The worker creates it and the scheduler applies it to its own copy."""

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
    left: int = 0  # number of positions that are output with this commit
    logprobs: list | None = None  # Canvas.logprobs, from the step that reads a starting text

    @property
    def positions(self) -> np.ndarray:
        """[F] positions that get a token"""
        return self.read[self.filled]

    @property
    def changed(self) -> np.ndarray:
        """Positions whose token changes, ascending"""
        return np.union1d(self.positions, self.revoked) if len(self.revoked) else self.positions
