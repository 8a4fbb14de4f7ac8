"""What a decoding can be besides a rule that fills masks: a class to derive from for each canvas feature.

The features in vllm_dlm/engine look for these classes. They hold no options, which belong to the decoding itself.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from vllm_dlm.plugins.decoding.base import Memory, check


class SpeculativeDecoding:
    """Reads canvases of its next steps in the same forward, see canvas/speculation.py."""

    drafts: int  # canvases of a request in one step, its own among them


def without_speculation(decoding: Any) -> Any:
    speculates = isinstance(decoding, SpeculativeDecoding)
    return replace(decoding, drafts=1) if speculates else decoding


class RevokingDecoding:
    """May turn tokens of the current canvas block into masks again, see canvas/revision.py."""

    def judges(self, memory: Memory | None) -> bool:
        """Whether this step may revoke tokens, so that the shadow of the block is read"""
        return True

    def revoked(self, noted: np.ndarray, filled: int, memory: Memory | None, unjudged: bool = False) -> np.ndarray:
        """Indices of the tokens that become masks again, in a step that has filled `filled` other positions. `noted`
        [Memory.noted, S]: what `propose` noted at the shadow of each token. `unjudged`: the tokens are those of a
        starting text and no step has judged them yet. This step does, whatever it fills."""
        raise NotImplementedError


class EditingDecoding:
    """May replace tokens of the current canvas block, see canvas/revision.py. Candidates include them."""

    def settled(self, masks: int, held: np.ndarray, changed: int, memory: Memory | None) -> bool:
        """Whether no token changes any more, after a step that has left `masks` masks and changed `changed` positions.
        `held` [C] bool: candidates that held a token before the step"""
        raise NotImplementedError


class RandomOrder:
    """Fills positions in random order, so that no threshold applies to what ranks them."""

    def __post_init__(self):
        super().__post_init__()  # type: ignore[misc]
        for field in ("threshold", "factor"):
            value = getattr(self, field)
            check(value is None, field, value, f"unset: {self.name} fills positions in random order")  # type: ignore[attr-defined]
