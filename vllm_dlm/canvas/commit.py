"""A commit: the changes of one step to a canvas. The worker creates it and the scheduler applies it to its own copy."""

from dataclasses import dataclass, field, replace

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

    def with_token(self, positions: np.ndarray, token: int) -> "Commit":
        """This commit, and a token that is certain at more positions, ascending"""
        if not len(positions):
            return self
        read = np.union1d(self.read, positions)
        confidence = np.ones(len(read), np.float32)
        confidence[np.searchsorted(read, self.read)] = self.confidence
        confidence[np.searchsorted(read, positions)] = 1.0
        filled = np.union1d(self.positions, positions)
        tokens = np.full(len(filled), token, np.int64)
        own = ~np.isin(self.positions, positions)
        tokens[np.searchsorted(filled, self.positions[own])] = self.tokens[own]
        return replace(self, read=read, confidence=confidence, filled=np.searchsorted(read, filled), tokens=tokens)
