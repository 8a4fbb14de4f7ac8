"""Base classes for decodings that use a canvas feature beyond filling masks.

The features in vllm_dlm/canvas test for these classes. Options are fields of the decoding itself.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from vllm_dlm.plugins.decoding.base import Memory, check


class SpeculativeDecoding:
    """Reads speculative canvases of its next steps in the same forward, see canvas/speculation.py."""

    drafts: int  # canvases of a request in one step, including its own


def without_speculation(decoding: Any) -> Any:
    speculates = isinstance(decoding, SpeculativeDecoding)
    return replace(decoding, drafts=1) if speculates else decoding


class ShadowingDecoding:
    """Reads shadow rows beside those of its canvas. This requires attention to the whole canvas."""


class VerifyingDecoding(ShadowingDecoding):
    """Proposes tokens that the next step may fill in addition to its own, see canvas/verification.py."""

    @property
    def most_drafts(self) -> int:
        """Maximum number of drafts of a step"""
        raise NotImplementedError

    def drafts(self, prob: np.ndarray, filled: np.ndarray) -> np.ndarray:
        """Indices of the masks that the next step verifies, in the order in which they depend on each other. `prob`
        [C]: probability of the token proposed for each mask; `filled`: indices of masks that this step fills"""
        raise NotImplementedError

    def accepted(self, prob: np.ndarray) -> int:
        """Number of leading drafts that are filled. `prob`: probability of each draft, given the drafts before it"""
        raise NotImplementedError


class RevokingDecoding(ShadowingDecoding):
    """May turn tokens of the current canvas block back into masks, see canvas/revision.py."""

    def judges(self, memory: Memory | None) -> bool:
        """Whether this step may revoke tokens, so that the shadow of the block is read"""
        return True

    def revoked(self, noted: np.ndarray, filled: int, memory: Memory | None, unjudged: bool = False) -> np.ndarray:
        """Indices of the tokens that become masks again, in a step that fills `filled` other positions. `noted`
        [Memory.noted, S]: values that `propose` noted at the shadow of each token. `unjudged`: the tokens come from a
        starting text and no step has judged them yet; this step judges them even if it fills nothing."""
        raise NotImplementedError


class EditingDecoding:
    """May replace tokens of the current canvas block, see canvas/revision.py. Candidates include them."""

    def settled(self, masks: int, held: np.ndarray, changed: int, memory: Memory | None) -> bool:
        """Whether the block is finished, after a step that left `masks` masks and changed `changed` positions. `held`
        [C] bool: candidates that held a token before the step"""
        raise NotImplementedError


class EndStopDecoding:
    """May fill all later positions of a canvas block with its first end token, see canvas/end_stop.py."""

    end_stop: bool


class RandomOrder:
    """Fills positions in random order, so thresholds on the score do not apply."""

    def __post_init__(self):
        super().__post_init__()  # type: ignore[misc]
        for field in ("threshold", "factor"):
            value = getattr(self, field)
            check(value is None, field, value, f"unset: {self.name} fills positions in random order")  # type: ignore[attr-defined]
