"""LLaDA2.1's token editing: fills many masks per step and rereads the block until no token changes.

https://huggingface.co/inclusionAI/LLaDA2.1-mini, generate of its code. Each step fills the masks
whose best token is more probable than the threshold, at least one. It also
replaces tokens if another token is more probable than the editing threshold.
Tokens filled in a step are not edited in the same step. Once no mask is left,
the block is read up to `max_post_steps` more times, until a step edits nothing.
With an editing threshold of 0 every token that is not the most probable one is
replaced, with 1 none.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vllm_dlm.plugins.decoding.base import Memory, Proposal, Random, Turn, best, check, required
from vllm_dlm.plugins.decoding.low_confidence import LowConfidence
from vllm_dlm.plugins.decoding.roles import EditingDecoding


@dataclass(frozen=True)
class TokenEditing(EditingDecoding, LowConfidence):
    name: ClassVar[str] = "token_editing"
    presets: ClassVar[dict[str, dict]] = {
        "quality": {"threshold": 0.7, "editing_threshold": 0.5},
        "speed": {"threshold": 0.5, "editing_threshold": 0.0},
    }
    threshold: float | None = required(0.7)
    editing_threshold: float = 0.5
    max_post_steps: int = 16

    def __post_init__(self):
        super().__post_init__()
        editing, post = self.editing_threshold, self.max_post_steps
        check(0 <= editing <= 1, "editing_threshold", editing, "between 0 and 1")
        check(0 <= post <= 1000, "max_post_steps", post, "between 0 and 1000")
        check(self.steps is None, "steps", self.steps, "unset: tokens are filled by threshold")
        check(self.factor is None, "factor", self.factor, "unset: tokens are filled by threshold")

    def memory(self) -> "Posts":
        return Posts()

    def most_steps(self, masks: int, scheduled: int) -> int:
        return masks + self.max_post_steps + 2

    def choose(self, proposal: Proposal, turn: Turn, rng: Random) -> np.ndarray:
        assert turn.held is not None and turn.tokens is not None
        masked = np.flatnonzero(~turn.held)
        prob = proposal.prob[masked]
        limit = np.inf if self.threshold is None else self.limit(turn)
        sure = masked[prob > limit]
        filled = sure if len(sure) else masked[best(prob, 1)]
        other = (proposal.token != turn.tokens) & (proposal.prob > self.editing_threshold)
        return np.union1d(filled, np.flatnonzero(turn.held & other))

    def settled(self, masks: int, held: np.ndarray, changed: int, memory: Memory | None) -> bool:
        assert isinstance(memory, Posts)
        if masks:
            return False
        if held.all() and not changed:
            return True
        memory.made += 1  # counts the next step
        return memory.made > self.max_post_steps


class Posts(Memory):
    """Number of steps without a mask, including the next one."""

    made = 0
