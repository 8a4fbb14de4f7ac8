"""WINO: fills many masks per step and revokes tokens that their context does not confirm.

https://arxiv.org/abs/2507.18578. Every mask of the block whose best token is
more probable than tau1 is filled, up to a share of the masks. The same forward
judges the tokens filled earlier, at shadow rows that see everything except the
token itself (canvas/revision.py). A token whose probability there is below tau2
becomes a mask again. A forward revokes fewer tokens than the previous one
filled, so a block needs at most as many forwards as it has masks. Tokens of a
starting text are judged by the first forward of their block, as if a previous
one had filled AT_FIRST of them.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from vllm_dlm.plugins.decoding.base import LogitRows, Memory, Proposal, Random, Turn, best, check
from vllm_dlm.plugins.decoding.held import HeldTokens, held_probability
from vllm_dlm.plugins.decoding.low_confidence import LowConfidence
from vllm_dlm.plugins.decoding.roles import RevokingDecoding

#: a forward fills at most this share of the masks, clamped to [FEWEST, MOST]
SHARE, FEWEST, MOST = 0.7, 5, 20
#: number of positions that count as filled before a block's first forward
AT_FIRST = 30


@dataclass(frozen=True)
class Wino(RevokingDecoding, LowConfidence):
    name: ClassVar[str] = "wino"
    presets: ClassVar[dict[str, dict]] = {
        "gsm8k": {"tau1": 0.6, "tau2": 0.9, "block_length": 128},
        "math": {"tau1": 0.7, "tau2": 0.9, "block_length": 128},
        "humaneval": {"tau1": 0.7, "tau2": 0.9, "block_length": 128},
        "mbpp": {"tau1": 0.8, "tau2": 0.9, "block_length": 128},
    }

    tau1: float = 0.6  # masks whose best token is more probable are filled
    tau2: float = 0.9  # tokens that are less probable are revoked
    block_length: int | None = 128

    def __post_init__(self):
        super().__post_init__()
        check(0 <= self.tau1 <= 1, "tau1", self.tau1, "between 0 and 1")
        check(0 <= self.tau2 <= 1, "tau2", self.tau2, "between 0 and 1")
        check(self.steps is None, "steps", self.steps, "unset: wino fills by tau1")

    def memory(self) -> "Accepted":
        return Accepted()

    @classmethod
    def propose(cls, logits_RV: torch.Tensor, rows: LogitRows) -> Proposal:
        noted = held_probability(logits_RV, rows)
        return replace(super().propose(logits_RV, rows), noted=noted)

    def choose(self, proposal: Proposal, turn: Turn, rng: Random) -> np.ndarray:
        masks = len(proposal.prob)
        trusted = int((proposal.prob > self.tau1).sum())
        most = min(max(int(SHARE * masks), FEWEST), MOST)
        chosen = best(proposal.prob, max(1, min(trusted, most)))
        return self.or_probable(chosen, proposal.prob, turn)

    def most_steps(self, masks: int, scheduled: int) -> int:
        # Tokens of a starting text are judged in the first two steps, which may have nothing to fill.
        return masks + 2 * AT_FIRST

    def judges(self, memory: Memory | None) -> bool:
        assert isinstance(memory, Accepted)
        return memory.last > 1

    def revoked(self, noted: np.ndarray, filled: int, memory: Memory | None, unjudged: bool = False) -> np.ndarray:
        assert isinstance(memory, Accepted)
        most, memory.last = (AT_FIRST if unjudged else memory.last) - 1, filled
        if filled <= 1 and not unjudged:
            return np.zeros(0, np.int64)
        (prob,) = noted
        doubtful = np.flatnonzero(prob < self.tau2)
        return doubtful[best(-prob[doubtful], max(most, 0))]


class Accepted(HeldTokens):
    def __init__(self):
        self.last = AT_FIRST  # number of positions that the block's last forward filled
