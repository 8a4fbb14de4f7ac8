"""A decoding that fills in known tokens to get their log-probabilities. Each forward of a score is one request.

Requests select it with `dlm_score`, an object with the start of the continuation, its tokens, and its masked tokens.
`vllm_xargs` cannot carry objects, so over HTTP only the score route creates it; in Python, `score` does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from vllm_dlm.options.types import OptionError, typed
from vllm_dlm.plugins.decoding.base import Decoding, LogitRows, Memory, Proposal, Random, Turn, at_token, check
from vllm_dlm.shown import short, shown

#: the option of a request
SCORE = "dlm_score"
#: other options that a request for a score can set -> fields of the decoding
WITH_SCORE = {"dlm_steps": "steps", "dlm_cfg_scale": "cfg_scale"}
#: fields of `dlm_score`
PARTS = ("start", "answer", "masked")


class Answer(Memory):
    """The known token of each position. Positions after the continuation, in the rest of a canvas block, may hold any
    token."""

    def __init__(self, start: int, answer: tuple[int, ...]):
        self.start, self.answer = start, np.array(answer)

    def columns(self, positions: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
        return {"answer": self.answer[np.minimum(positions - self.start, len(self.answer) - 1)][:, None]}


@dataclass(frozen=True)
class Scored(Decoding):
    """Not selectable by name."""

    name: ClassVar[str] = "score"

    start: int = 1  # number of tokens of the context
    answer: tuple[int, ...] = ()  # the continuation
    masked: tuple[int, ...] | None = None  # indices of its tokens that are masked; None: all

    def __post_init__(self):
        super().__post_init__()
        check(self.start >= 1, "start", self.start, "a whole number of at least 1")
        check(len(self.answer) >= 1, "answer", self.answer, "a list of at least one token")
        if self.masked is not None:
            order = np.array(self.masked)
            fit = len(order) and order[0] >= 0 and order[-1] < len(self.answer) and (np.diff(order) > 0).all()
            check(bool(fit), "masked", self.masked, f"ascending numbers below {len(self.answer)}, at least one")

    @classmethod
    def from_request(cls, given: Mapping[str, Any], block_length: int | None) -> "Scored":
        """From a request's `dlm_*` options; `block_length`: for block-causal models"""
        values: dict[str, Any] = {"steps": 1, "block_length": block_length}
        for key, value in given.items():
            if key in WITH_SCORE:
                values[WITH_SCORE[key]] = typed(cls, WITH_SCORE[key], value, key)
            elif key != SCORE:
                allowed = " and ".join(WITH_SCORE)
                raise OptionError(key, f"{short(key)}: not supported with {SCORE}, which only supports {allowed}")
        score = given[SCORE]
        if not isinstance(score, Mapping) or not {"start", "answer"} <= score.keys() <= set(PARTS):
            wanted = f"an object with {', '.join(PARTS)} (the last one is optional)"
            raise OptionError(SCORE, f"{SCORE}: {shown(score)} is not valid, it must be {wanted}")
        values |= {part: typed(cls, part, value, f"{SCORE}.{part}") for part, value in score.items()}
        try:
            return cls(**values)
        except ValueError as error:
            field = str(error).split(":", 1)[0]
            raise OptionError(SCORE, f"dlm_{error}" if f"dlm_{field}" in WITH_SCORE else f"{SCORE}.{error}") from None

    @property
    def end(self) -> int:
        return self.start + len(self.answer)

    def misfit(self, prompt: int, max_tokens: int, length: int, vocabulary: int, mask_id: int) -> str | None:
        """The reason why a request with this prompt cannot be scored, or None. `length`: positions of its canvas"""
        if (prompt, max_tokens) != (self.start, len(self.answer)):
            described = f"it describes {self.start} and {len(self.answer)} tokens"
            return f"{described}, but the prompt has {prompt} and max_tokens is {max_tokens}"
        if length < self.end:
            return f"context and continuation have {self.end} tokens, and the canvas has {length}"
        if not 0 <= min(self.answer) <= max(self.answer) < vocabulary or mask_id in self.answer:
            return f"tokens of a continuation must be between 0 and {vocabulary - 1}, except the mask, {mask_id}"
        return None

    # -- canvas and steps ------------------------------------------------------------------

    def starting_tokens(self, length: int, mask_id: int) -> np.ndarray:
        tokens = np.full(length, mask_id, dtype=np.int64)
        if self.masked is not None:
            tokens[: len(self.answer)] = self.answer
            tokens[list(self.masked)] = mask_id
        return tokens

    def block_steps(self, block: int, num_blocks: int, masks: int) -> int:
        return self.steps or 1

    def memory(self) -> Memory:
        return Answer(self.start, self.answer)

    @classmethod
    def propose(cls, logits_RV: torch.Tensor, rows: LogitRows) -> Proposal:
        token_R = rows.memory["answer"].squeeze(1)
        prob_R = (at_token(logits_RV, token_R) - logits_RV.logsumexp(-1)).exp_()
        return Proposal(token_R, prob_R, prob_R)

    def choose(self, proposal: Proposal, turn: Turn, rng: Random) -> np.ndarray:
        """An even share of the remaining positions, from the left. Positions after the continuation are filled together
        with its last tokens."""
        left = int((turn.positions < self.end).sum())
        share = -(-left // max((self.steps or 1) - turn.step, 1))
        return np.arange(share if share < left else len(turn.positions))
