"""Infill: canvases with given text after the prompt. A suffix, a starting text, or a template.

- A suffix is text after the canvas. Its rows precede those of the prompt, because both are fixed, and the model gets
  the position of each row. Plans, caches and selections therefore see a longer prompt.
- A starting text is read by the first forward, which masks the least probable tokens.
- A template is text with holes. An automaton defines the valid contents of a hole (holes.py). The head proposes only
  tokens with which all holes can still be completed, and a step accepts proposals that fit together. Once a hole has
  ended, its remaining positions are filled at once.

The front-end sends the layout of a canvas as plain data, see `Layout`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from vllm_dlm.canvas.automaton import Automaton
from vllm_dlm.canvas.commit import NOTHING, Commit
from vllm_dlm.canvas.feature import Feature, Output, Room
from vllm_dlm.canvas.holes import Holes
from vllm_dlm.canvas.stream import Logprobs, Reading, Stream
from vllm_dlm.client_cache import ClientCache
from vllm_dlm.options import Options
from vllm_dlm.plugins.decoding.base import best

if TYPE_CHECKING:
    from vllm_dlm.canvas.canvas import Canvas
    from vllm_dlm.canvas.denoising import Denoising

#: automata of this worker by content; requests with equal holes share one
AUTOMATA: ClientCache[str, Automaton] = ClientCache("automata")
#: logit of a token that is not allowed; finite, because it may be divided by a temperature
RULED_OUT = -1e30
#: number of bits that are unpacked at a time
PIECE = 1 << 22


# -- the layout of a canvas ----------------------------------------------------------------------


def lay_out(canvas: "Canvas") -> None:
    """Writes the starting text or the template to a new canvas."""
    layout, response = canvas.layout, canvas.tokens[canvas.prompt_len :]
    response[: len(layout.start)] = layout.start
    canvas.unread = bool(layout.start) and not layout.holes
    if layout.holes:
        masked = response == canvas.mask_id
        canvas.fixed = canvas.prompt_len + np.flatnonzero(~masked)
        canvas.blocks = blocks_of_masks(canvas.options, masked)


def blocks_of_masks(options: Options, masked: np.ndarray) -> list[tuple[int, int]]:
    """[start, end) of canvas blocks, such that each has the decoding's block length in masks; `masked` [N]. Fixed text
    of a template belongs to the block of the masks before it."""
    positions = np.flatnonzero(masked)
    starts = [0, *(int(positions[start]) for start, _ in options.decoding.blocks(len(positions))[1:])]
    return list(zip(starts, [*starts[1:], len(masked)], strict=True))


def row_positions(canvas: "Canvas") -> np.ndarray | None:
    """[N] positions that the rows of a canvas with a suffix represent; None: their own"""
    if not canvas.suffix:
        return None
    return (np.arange(len(canvas)) - canvas.suffix) % len(canvas)


# -- starting texts ------------------------------------------------------------------------------


class StartingText(Feature):
    name = "start"

    @classmethod
    def applies(cls, canvas: "Canvas") -> bool:
        return bool(canvas.layout.start) and not canvas.layout.holes

    def streams(self, state: "Denoising", made: list[Stream], room: Room) -> list[Stream]:
        """The first forward reads the tokens of the text."""
        canvas = state.canvas
        if not canvas.unread:
            return made
        text = canvas.prompt_len + np.flatnonzero(canvas.tokens[canvas.prompt_len :] != canvas.mask_id)
        return state.read(made, text, judged=True)

    def take_over(self, state: "Denoising", reading: Reading) -> Commit | None:
        """Masks the least probable tokens. Denoising begins with the next step."""
        canvas, positions = state.canvas, reading.positions
        if not canvas.unread:
            return None
        prob = np.asarray(reading.proposal.prob, np.float32)
        doubted = np.sort(best(-prob, round(canvas.layout.remask * len(positions))))
        commit = Commit(positions, prob, NOTHING, NOTHING, positions[doubted])
        if reading.logprobs is not None:
            for index, record in zip(positions - canvas.prompt_len, reading.logprobs, strict=True):
                state.logprobs[index] = record
            commit = replace(commit, logprobs=list(state.logprobs))
        return commit

    def output(self, state: "Denoising") -> Output | None:
        """Outputs several canvas blocks at once, since blocks of a starting text may have no masks."""
        tokens, records = state.take_block()
        while tokens and tokens[-1] not in state.sampling.stop_ids:
            more, more_records = state.take_block()
            if not more:
                break
            tokens, records = tokens + more, records + more_records
        return tokens, records


# -- templates -----------------------------------------------------------------------------------


def automaton_from_plain(plain: dict) -> Automaton:
    found = AUTOMATA.get(plain["key"])
    return AUTOMATA.put(plain["key"], Automaton.from_plain(plain)) if found is None else found


class Template(Feature):
    name = "template"

    @classmethod
    def applies(cls, canvas: "Canvas") -> bool:
        return bool(canvas.layout.holes)

    def __init__(self, canvas: "Canvas"):
        super().__init__(canvas)
        layout, first = canvas.layout, canvas.prompt_len
        automata = [automaton_from_plain(plain) for plain in layout.automata]
        holes = [(first + start, length, automata[index]) for start, length, index in layout.holes]
        self.holes = Holes(holes, canvas.tokens, canvas.mask_id, layout.ends[0])

    def streams(self, state: "Denoising", made: list[Stream], room: Room) -> list[Stream]:
        for stream in made:
            assert stream.reading is not None
            stream.reading.constraint = HoleConstraint(self.holes)
        return made

    def absorb(self, state: "Denoising", commit: Commit, reading: Reading) -> Commit:
        """Keeps the chosen tokens that fit together. Masks come before replacements, so that each step fills at least
        one, then the most probable tokens first."""
        if not len(commit.filled):
            return commit
        chosen, prob = commit.filled, reading.proposal.prob
        order = chosen[np.lexsort((-prob[chosen], reading.held[chosen]))].tolist()
        accepted = self.holes.accepted(reading.positions, reading.proposal.token, order)
        return replace(commit, filled=accepted, tokens=reading.proposal.token[accepted])

    def finish(self, state: "Denoising", commit: Commit) -> Commit:
        """Fills the remaining positions of holes that end with this commit, even after the current canvas block."""
        over = self.holes.over()
        self.holes.put(commit.revoked.tolist(), None)
        return commit.with_token(over, self.holes.end_token)

    def output(self, state: "Denoising") -> Output | None:
        """Finished canvas blocks without the end tokens of holes; after the last block, the end token of the answer."""
        canvas, tokens, records = state.canvas, list[int](), list[Any]()
        while state.settled and (block := canvas.finished()) is not None:
            for position in range(*block):
                if not self.holes.ended(position):
                    tokens.append(int(canvas.tokens[position]))
                    records.append(state.logprobs[position - canvas.prompt_len])
            state.hand_out(block[1] - block[0])
        if canvas.emitted == len(canvas) - canvas.prompt_len:
            tokens.append(canvas.layout.ends[0])
            records.append(None)
        if (count := state.sampling.num_logprobs) is not None:
            pairs = zip(tokens, records, strict=True)
            records = [record or Logprobs.certain(token, count) for token, record in pairs]
        return tokens, records


# -- tokens that a template allows, for the head -------------------------------------------------


class HoleConstraint(NamedTuple):
    holes: Holes

    def gather(self, readings: Sequence[Reading], width: int, upload: Any) -> "AllowedTokens":
        bits, row = allowed_tokens([(r.constraint.holes, r.positions) for r in readings], width)  # type: ignore[union-attr]
        return AllowedTokens(upload(bits), upload(row))


class AllowedTokens(NamedTuple):
    bits_SW: torch.Tensor  # [S, ceil(V / 32)] int32, distinct rows of bits
    row_R: torch.Tensor  # [R] row of bits of each logits row

    def rule_out(self, logits_RV: torch.Tensor, piece: slice) -> None:
        rule_out_others(logits_RV, self.bits_SW, self.row_R[piece])


def allowed_tokens(readings: Sequence[tuple[Holes | None, np.ndarray]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """-> rows of bits [S, ceil(width / 32)] int32, where row 0 allows all tokens, and the row of each position of each
    reading, [R] int64"""
    found: dict[Automaton, dict[tuple[int, int], int]] = {}  # states before and after a position -> row
    places = list[tuple[Automaton, int] | None]()
    for holes, positions in readings:
        for position in positions.tolist():
            if (place := holes.between(position) if holes else None) is None:
                places.append(None)
                continue
            automaton, between = place
            known = found.setdefault(automaton, {})
            places.append((automaton, known.setdefault(between, len(known))))
    bits = np.zeros((1 + sum(map(len, found.values())), -(-width // 32)), np.int32)
    bits[0], first, firsts = -1, 1, dict[Automaton, int]()
    for automaton, known in found.items():
        automaton.mark(bits[first : first + len(known)], list(known))
        firsts[automaton], first = first, first + len(known)
    rows = [0 if place is None else firsts[place[0]] + place[1] for place in places]
    return bits, np.array(rows, np.int64)


def rule_out_others(logits_RV: torch.Tensor, bits_SW: torch.Tensor, row_R: torch.Tensor) -> None:
    """Rules out tokens without a bit in the bits of their logits row, in place."""
    size = logits_RV.shape[1]
    octets_SB = bits_SW.view(torch.uint8)
    shifts = torch.arange(8, dtype=torch.uint8, device=logits_RV.device)
    step = max(PIECE // size, 1)
    for start in range(0, len(logits_RV), step):
        octets_RB = octets_SB[row_R[start : start + step]]
        bits_RV = ((octets_RB.unsqueeze(2) >> shifts) & 1).flatten(1)[:, :size]
        logits_RV[start : start + step].masked_fill_(bits_RV == 0, RULED_OUT)
