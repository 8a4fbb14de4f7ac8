"""Verification (Flash-dLLM): a step also judges tokens that the step before it proposed and did not fill.

The tokens are drafts, in the order of their probability. A stream of two rows per draft is added to the step: the draft
itself, and a mask at the same position. A draft attends to the drafts up to its own and to the masks after it, a mask
to the drafts before it and to the masks from its own on, and both to the canvas except its rows at these positions. The
mask gives the probability of the draft, given the drafts before it. The decoding derives from `VerifyingDecoding` and
says how many leading drafts are filled. Keys and values of these rows are not stored.

Nothing is verified with guidance, a template, a temperature or log-probabilities, or if logits predict the next
position (`_verifies`): the method is published for models without a shift.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from vllm_dlm.canvas.commit import NOTHING, Commit
from vllm_dlm.canvas.feature import Feature, Room
from vllm_dlm.canvas.stream import Reading, Stream
from vllm_dlm.plugins.decoding.roles import VerifyingDecoding
from vllm_dlm.plugins.reuse.base import Reuse, StepPlan, span

if TYPE_CHECKING:
    from vllm_dlm.canvas.canvas import Canvas
    from vllm_dlm.canvas.denoising import Denoising


class Verification(Feature):
    name = "verification"

    @classmethod
    def applies(cls, canvas: "Canvas") -> bool:
        return isinstance(canvas.options.decoding, VerifyingDecoding)

    def open_block(self, canvas: "Canvas") -> None:
        self.positions, self.tokens = NOTHING, NOTHING  # [S] drafts, in the order in which they depend on each other

    def streams(self, state: "Denoising", made: list[Stream], room: Room) -> list[Stream]:
        reading = made[0].reading
        assert reading is not None
        left = state.canvas.tokens[self.positions] == state.canvas.mask_id  # others are behind an end token
        self.positions, self.tokens = self.positions[left], self.tokens[left]
        if not len(self.positions) or not self._verifies(state, reading) or len(made) > 1:
            return made
        order = np.argsort(self.positions)
        judged = Reading(state, self.positions[order], made_by=self.name)
        judged.tokens = self.tokens[order]
        reading.others.append(judged)
        return [*made, drafts(made[0], judged, self.positions, self.tokens, state.canvas.mask_id)]

    @staticmethod
    def _verifies(state: "Denoising", reading: Reading) -> bool:
        sampling, canvas = state.sampling, state.canvas
        plain = sampling.greedy and sampling.num_logprobs is None and not canvas.layout.holes
        due = state.options.reuse.due(reading.positions, canvas.progress)
        return plain and not canvas.shift and due is None and len(reading.positions) > 0

    def absorb(self, state: "Denoising", commit: Commit, reading: Reading) -> Commit:
        decoding = state.options.decoding
        for judged in reading.added_by(self.name):
            commit = self._with_accepted(decoding, commit, judged)
        verifies = len(reading.positions) and self._verifies(state, reading)
        chosen = decoding.drafts(reading.proposal.prob, commit.filled) if verifies else NOTHING
        self.positions, self.tokens = reading.positions[chosen], reading.proposal.token[chosen]
        return commit

    def _with_accepted(self, decoding: VerifyingDecoding, commit: Commit, judged: Reading) -> Commit:
        """The commit with drafts up to the first one that is not accepted, or that a later token replaces"""
        assert judged.proposal.noted is not None
        prob = judged.proposal.noted[0][np.searchsorted(judged.positions, self.positions)]
        filled = dict(zip(commit.positions.tolist(), commit.tokens.tolist(), strict=True))
        read = set(commit.read.tolist())
        accepted = decoding.accepted(prob)
        for position, token in zip(self.positions[:accepted].tolist(), self.tokens[:accepted].tolist(), strict=True):
            if position not in read or filled.setdefault(position, token) != token:
                break
        positions = np.array(sorted(filled), np.int64)
        tokens = np.array([filled[position] for position in positions.tolist()], np.int64)
        return replace(commit, filled=np.searchsorted(commit.read, positions), tokens=tokens)


def drafts(stream: Stream, reading: Reading, positions: np.ndarray, tokens: np.ndarray, mask_id: int) -> Stream:
    length, count = len(stream.token_ids), len(positions)
    places = np.arange(length)
    if stream.last is not None:
        places[-1] = stream.last
    if stream.positions is not None:
        places = stream.positions[places]
    return replace(
        stream,
        reuse=Reuse(),  # every row is recomputed in every step
        plan=StepPlan.dense(span(length, length + 2 * count)),
        token_ids=np.concatenate([stream.token_ids, tokens, np.full(count, mask_id)]),
        positions=np.concatenate([places, places[positions], places[positions]]),
        last=None,
        head_positions=span(length + count, length + 2 * count),
        changed=NOTHING,
        feature_rows=0,
        selected=None,
        filtered=False,
        chooses=False,
        hidden_row=0,
        drafted=positions,
        reading=reading,
    )


def shadow_rows(canvas: "Canvas") -> int:
    """Maximum number of rows of drafts and their masks in the next step"""
    decoding = canvas.options.decoding
    return 2 * decoding.most_drafts if isinstance(decoding, VerifyingDecoding) and canvas.block_step else 0
