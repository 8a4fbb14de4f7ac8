"""Speculation (FreeDave): one forward also reads the canvases that the next steps are expected to produce.

Speculative canvas i is the canvas with its i most probable masks filled by the tokens that the last step proposed. If
the tokens that a step chooses turn the canvas into one of them, its logits are those of the next step, so that step is
made at once, and so on. Speculation does not change texts.

All canvases share the keys and values outside the canvas block and have separate KV blocks for it. The reuse policy
must therefore recompute exactly the canvas block between refreshes (`Reuse.block_alone`). Nothing is speculated with
guidance, a selection, a template, a temperature or log-probabilities (`most_canvases`, `_speculates`). The decoding
derives from `SpeculativeDecoding`, and the scheduler sets the number of canvases per step.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from vllm_dlm.canvas.commit import Commit
from vllm_dlm.canvas.feature import Feature, Room
from vllm_dlm.canvas.stream import Reading, Stream

if TYPE_CHECKING:
    from vllm_dlm.canvas.canvas import Canvas
    from vllm_dlm.canvas.denoising import Denoising

#: position of a mask, and the token proposed for it
Guess = tuple[int, int]


class Speculation(Feature):
    name = "speculation"

    @classmethod
    def applies(cls, canvas: "Canvas") -> bool:
        return canvas.options.canvases > 1

    def __init__(self, canvas: "Canvas"):
        self.copied = -1  # canvas block for which the speculative KV blocks hold the neighbouring keys and values
        super().__init__(canvas)

    def open_block(self, canvas: "Canvas") -> None:
        self.guesses: list[Guess] = []  # the last proposals for masks, the most probable first

    # -- before the forward ----------------------------------------------------------------

    def streams(self, state: "Denoising", made: list[Stream], room: Room) -> list[Stream]:
        """Adds one speculative canvas per guess, as long as a mask is left."""
        if not self._speculates(state, room):
            return made
        (stream,) = made
        reading, canvas = stream.reading, state.canvas
        assert reading is not None and stream.kv_table is not None
        guesses, tokens = self.guesses[: min(room.canvases, len(reading.positions)) - 1], canvas.progress.tokens
        size, own = room.caches.shape.block_size, state.blocks[0].speculative
        start, end = canvas.progress.block
        first, last = start // size, (end - 1) // size + 1  # KV blocks that hold part of the canvas block
        each = room.caches.shape.speculative_blocks(state.options, canvas.prompt_len, len(canvas))
        copies = None
        if guesses and self.copied != canvas.block:
            self.copied, number = canvas.block, len(own) // each
            to = np.concatenate([own[index * each :][: last - first] for index in range(number)])
            copies = np.stack([np.tile(stream.kv_table[first:last], number), to])
        added = []
        for index, (position, token) in enumerate(guesses):
            tokens = tokens.copy()
            tokens[position] = token
            table = stream.kv_table.copy()
            table[first:last] = own[index * each :][: last - first]
            masked = reading.positions[tokens[reading.positions] == canvas.mask_id]
            reading.others.append(Reading(state, masked, made_by=self.name))
            added.append(
                replace(
                    stream,
                    token_ids=tokens,
                    kv_table=table,
                    head_positions=state.head_rows(masked),
                    reading=reading.others[-1],
                    copies=None if index else copies,
                )
            )
        return [stream, *added]

    @staticmethod
    def _speculates(state: "Denoising", room: Room) -> bool:
        # A sampled token depends on its step, and a log-probability belongs to the step that filled the token.
        plain = state.sampling.greedy and state.sampling.num_logprobs is None
        return plain and room.canvases > 1 and not state.canvas.plan.refresh

    # -- after the forward -----------------------------------------------------------------

    def absorb(self, state: "Denoising", commit: Commit, reading: Reading) -> Commit:
        """The commit of the step together with the following steps that speculative canvases have verified."""
        if not len(reading.positions):
            return commit
        filled = dict(zip(commit.positions.tolist(), commit.tokens.tolist(), strict=True))
        speculative, confidence = reading.added_by(self.name), commit.confidence.copy()
        read, proposal, made = commit.read, reading.proposal, 0
        while right := self._right(filled, made, len(speculative)):
            made += right
            read, proposal = speculative[made - 1].positions, speculative[made - 1].proposal
            confidence[np.searchsorted(commit.read, read)] = proposal.prob
            chosen = state.choose(read, proposal)
            found = zip(read[chosen].tolist(), proposal.token[chosen].tolist(), strict=True)
            filled = dict(self.guesses[:made]) | dict(found)
        order = np.argsort(-proposal.prob, kind="stable")
        pairs = zip(read[order].tolist(), proposal.token[order].tolist(), strict=True)
        self.guesses = [(position, token) for position, token in pairs if position not in filled]
        positions = np.array(sorted(filled), np.int64)
        tokens = np.array([filled[position] for position in positions.tolist()], np.int64)
        return Commit(commit.read, confidence, np.searchsorted(commit.read, positions), tokens)

    def _right(self, filled: dict[int, int], first: int, last: int) -> int:
        """Number of consecutive guesses from `first` on that match the filled tokens"""
        right = 0
        for position, token in self.guesses[first:last]:
            if filled.get(position) != token:
                break
            right += 1
        return right
