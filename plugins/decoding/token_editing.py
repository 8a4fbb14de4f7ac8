"""LLaDA2.1's token editing: masks are filled widely, and what stands is read again and again until nothing changes.

https://huggingface.co/inclusionAI/LLaDA2.1-mini, generate of its code. In every step the masks
are filled whose best token is more probable than the threshold, at least one;
and a token that stands becomes another one, if that is more probable than the
editing threshold. What is filled in a step is not edited in it. Once nothing is
masked the block is read up to `max_post_steps` times more, until a step edits
nothing. An editing threshold of 0 edits wherever the best token is another one,
1 nowhere.
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
        memory.made += 1  # the next step would be one more
        return memory.made > self.max_post_steps


class Posts(Memory):
    """How many steps there were, the next one included, that found nothing masked."""

    made = 0
