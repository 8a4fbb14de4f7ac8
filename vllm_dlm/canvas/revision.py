"""Revision: tokens of the current canvas block change again after they were filled.

Revocation (WINO) masks tokens again that their context does not confirm. To judge them, a step reads a *shadow* of the
canvas block: one row per position of the block, each with a mask. A shadow row attends to the other shadow rows and to
the whole canvas except the token at its own position. Rows of the canvas do not attend to shadow rows. Keys and values
of shadow rows are not stored. Those of the canvas are read from its KV blocks, where its own rows have just written
them, so a shadow is computed after its canvas.

Editing (LLaDA2.1) needs no stream. All positions of the block are read, and a token may be replaced by another.

The decoding derives from `RevokingDecoding` or `EditingDecoding` and decides which tokens change. A block is output
once none of its tokens can change (`settled`).
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from vllm_dlm.canvas.commit import NOTHING, Commit
from vllm_dlm.canvas.feature import Feature, Room
from vllm_dlm.canvas.stream import Reading, Stream, contained
from vllm_dlm.plugins.decoding.roles import EditingDecoding, RevokingDecoding
from vllm_dlm.plugins.reuse.base import Progress, Reuse, StepPlan, span

if TYPE_CHECKING:
    from vllm_dlm.canvas.canvas import Canvas
    from vllm_dlm.canvas.denoising import Denoising


class Revocation(Feature):
    name = "shadow"

    @classmethod
    def applies(cls, canvas: "Canvas") -> bool:
        return isinstance(canvas.options.decoding, RevokingDecoding)

    def open_block(self, canvas: "Canvas") -> None:
        # Tokens of a starting text must have been judged once.
        self.settled = not len(revocable(canvas))

    def streams(self, state: "Denoising", made: list[Stream], room: Room) -> list[Stream]:
        """With guidance, the unconditional stream has a shadow, too."""
        if self.settled and not state.options.decoding.judges(state.memory):
            return made
        if not len(positions := self._readable(state)):
            return made
        reading = made[0].reading
        assert reading is not None
        reading.others.append(Reading(state, positions, constraint=reading.constraint, made_by=self.name))
        return made + [shadow(stream, reading.others[-1], state.canvas.progress) for stream in made]

    @staticmethod
    def _readable(state: "Denoising") -> np.ndarray:
        """Positions whose tokens may be revoked in this step. A later step of the block must be able to fill them
        again."""
        at, plan, positions = state.canvas.progress, state.canvas.plan, revocable(state.canvas)
        if state.options.reuse.due(positions, at) is not None:
            return NOTHING
        return positions[contained(plan.live, at.rows_reading(positions))]

    def absorb(self, state: "Denoising", commit: Commit, reading: Reading) -> Commit:
        if self.settled and not len(reading.positions):
            return commit
        canvas, decoding = state.canvas, state.options.decoding
        positions, noted = NOTHING, np.zeros((state.noted, 0))
        for judged in reading.added_by(self.name):
            positions = judged.positions
            if judged.proposal.noted is not None:
                noted = judged.proposal.noted
        revoked = decoding.revoked(noted, len(commit.filled), state.memory, unjudged=not self.settled)
        # The first step of a block may read only one position, see Reuse.due. The second one reads the others.
        self.settled = self.settled or canvas.block_step > 0 or len(positions) == len(revocable(canvas))
        return replace(commit, revoked=np.sort(positions[revoked]))


def shadow(stream: Stream, reading: Reading, at: Progress) -> Stream:
    start, end = at.block
    rows = span(*at.rows_reading(np.array((start, end))))
    tokens = stream.token_ids.copy()
    tokens[rows] = at.mask_id
    return replace(
        stream,
        reuse=Reuse(),  # every row is recomputed in every step
        plan=StepPlan.dense(rows),
        token_ids=tokens,
        head_positions=at.rows_reading(reading.positions),
        changed=NOTHING,
        feature_rows=0,
        selected=None,
        filtered=False,
        chooses=False,
        hidden_row=at.shift,
        reading=reading,
    )


def revocable(canvas: "Canvas") -> np.ndarray:
    """Positions of the current canvas block whose tokens may become masks again"""
    if not isinstance(canvas.options.decoding, RevokingDecoding) or canvas.unread:
        return NOTHING
    start, end = canvas.progress.block
    positions = start + np.flatnonzero(canvas.tokens[start:end] != canvas.mask_id)
    if not canvas.layout.holes:
        return positions
    positions = np.setdiff1d(positions, canvas.fixed)
    return positions[~np.isin(canvas.tokens[positions], canvas.layout.ends)]  # end tokens of holes are kept


def shadow_rows(canvas: "Canvas") -> int:
    """Maximum number of shadow rows per stream in the next step"""
    return canvas.block_width if len(revocable(canvas)) else 0


class Editing(Feature):
    name = "editing"

    @classmethod
    def applies(cls, canvas: "Canvas") -> bool:
        return isinstance(canvas.options.decoding, EditingDecoding)

    def open_block(self, canvas: "Canvas") -> None:
        self.settled = False

    def streams(self, state: "Denoising", made: list[Stream], room: Room) -> list[Stream]:
        """Reads all positions of the canvas block, not only its masks."""
        canvas = state.canvas
        start, end = canvas.progress.block
        block = np.setdiff1d(span(start, end), canvas.fixed) if len(canvas.fixed) else span(start, end)
        return state.read(made, np.union1d(canvas.candidates(), block))

    def applied(self, state: "Denoising", commit: Commit, reading: Reading) -> None:
        canvas, decoding = state.canvas, state.options.decoding
        # A block does not wait for masks of the prompt, where partial steps of some policies have no rows.
        masks = int((canvas.candidates() >= canvas.prompt_len).sum())
        if len(reading.positions):
            self.settled = decoding.settled(masks, reading.held, len(commit.filled), state.memory)
        elif not masks:  # partial steps of this policy can read no position
            self.settled = True
