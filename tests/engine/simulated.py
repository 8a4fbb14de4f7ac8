"""Requests denoised by a simulated model: the host's half of an engine without vLLM, checked in every step.

The scheduler's canvas and the worker's `Denoising` go through the same commits
as in an engine. Proposals are drawn from the tokens of the canvas alone, so a
request that is preempted must come to the same answer.
"""

import zlib
from dataclasses import dataclass, field, replace

import numpy as np

from tests.engine.holes import EOS, MASK, SIZE
from vllm_dlm.cache.budget import BlockShape
from vllm_dlm.canvas import block_causal
from vllm_dlm.canvas.caches import StreamCaches
from vllm_dlm.canvas.canvas import Canvas, Commit
from vllm_dlm.canvas.denoising import Denoising
from vllm_dlm.canvas.end_stop import EndStop
from vllm_dlm.canvas.infill import Template
from vllm_dlm.canvas.stream import Logprobs, Reading, Sampling
from vllm_dlm.options import Options
from vllm_dlm.options.texts import NO_LAYOUT, Layout
from vllm_dlm.plugins.decoding.base import Proposal, Turn
from vllm_dlm.plugins.decoding.roles import EditingDecoding
from vllm_dlm.plugins.reuse.base import RowShape

SHAPE = BlockShape(16, 2, 8, RowShape(32, 32))
#: how the simulated model's probabilities are distributed, in a canvas of some masks
CONFIDENCE = {
    "any": lambda rng, size, masks: rng.random(size),
    "sure": lambda rng, size, masks: np.ones(size),
    "unsure": lambda rng, size, masks: rng.random(size) * 1e-3,
    "ties": lambda rng, size, masks: rng.choice([0.1, 0.5, 0.95], size),
    "sure of few": lambda rng, size, masks: np.full(size, 1.0 if masks <= 5 else 1e-3),
}


@dataclass(frozen=True)
class Case:
    """One request."""

    options: Options
    prompt: tuple[int, ...]
    max_tokens: int
    max_model_len: int
    layout: Layout = NO_LAYOUT
    shift: int = 0
    seed: int = 0
    confidence: str = "any"
    ends: float = 0.0  # share of positions at which the model proposes an end token, if it may
    stops: bool = False  # an end token ends the answer
    canvases: int = 1  # per step, with freedave; see DenoisingSchedule.canvases
    logprobs: bool = False

    @property
    def canvas(self) -> Canvas:
        """As the scheduler makes it"""
        length = self.options.canvas_length(len(self.prompt), self.max_tokens, self.max_model_len)
        if self.layout.holes:
            length = len(self.prompt) + len(self.layout.start)
        return Canvas(self.options, MASK, self.shift, list(self.prompt), length, self.layout)

    @property
    def sampling(self) -> Sampling:
        stop_ids = frozenset({EOS} if self.stops or self.layout.holes else ())
        return Sampling(0.0, 1.0, 0, self.seed, stop_ids, 0 if self.logprobs else None)

    def finished(self, tokens: list[int]) -> bool:
        """vLLM's check_stop"""
        longest = min(self.max_tokens, self.max_model_len - len(self.prompt))
        return len(tokens) >= longest or bool(self.sampling.stop_ids.intersection(tokens[-1:]))


class CheckedDenoising(Denoising):
    def _turn(self, positions: np.ndarray) -> Turn:
        turn = super()._turn(positions)
        counted = positions[self.canvas.tokens[positions] == MASK]
        counted = self.options.decoding.scheduled(counted, self.canvas.prompt_len)
        assert min(counted, 1) <= turn.quota <= len(positions), (turn.quota, self.quotas, self.filled)
        return turn


@dataclass
class Run:
    """One request from start to end. `preempted`: before these steps of the request it loses its caches."""

    case: Case
    preempted: frozenset[int] = frozenset()
    tokens: list[int] = field(default_factory=list)
    records: list = field(default_factory=list)
    forwards: int = 0
    revoked: int = 0
    ended: int = 0  # forwards that filled in an end token

    def __post_init__(self):
        self.canvas = self.case.canvas
        self._start()

    def _start(self) -> None:
        self.state = CheckedDenoising("r", self.canvas.copy(), self.case.sampling)
        self.caches = StreamCaches(SHAPE)

    def finish(self) -> "Run":
        while not self.case.finished(self.tokens):
            if self.forwards in self.preempted:
                self.canvas.rewind()
                self._start()
            self.step()
        return self

    def step(self) -> None:
        state, canvas = self.state, self.state.canvas
        assert np.array_equal(canvas.plan.live, self.canvas.plan.live)
        blocks = SHAPE.tokens(self.case.options, canvas.prompt_len, len(canvas), canvas.rows) // SHAPE.block_size
        canvases = min(self.case.canvases, self.case.options.canvases)
        streams = state.streams(self.caches, np.arange(blocks), canvases)
        (reading, *_) = (stream.reading for stream in streams if stream.reading is not None)
        for one in reading.all:
            (tokens, *_) = (stream.token_ids for stream in streams if stream.reading is one)
            self._propose(one, tokens)
        empty = self._may_fill_nothing(reading)
        settled, emitted, masks = state.settled, canvas.emitted, canvas.candidates()
        commit = state.commit(reading)
        beyond = self.case.layout.holes or state.feature(EndStop)  # they also change positions that are not read
        assert beyond or np.isin(commit.positions, reading.positions).all()
        tokens, records = state.take_output()
        self._apply(replace(commit, left=canvas.emitted - emitted))
        self.tokens += tokens
        self.records += records
        self.forwards += 1
        self.revoked += len(commit.revoked)
        self.ended += EOS in commit.tokens
        if not len(commit.filled) and not empty and settled:
            raise AssertionError(f"step {canvas.step} has filled none of {len(masks)} masks")

    def _may_fill_nothing(self, reading: Reading) -> bool:
        """Whether the step has a purpose other than to fill masks"""
        canvas, options = self.state.canvas, self.case.options
        if canvas.unread or not block_causal.reads(canvas):
            return True
        masked = reading.positions[canvas.tokens[reading.positions] == MASK]
        if options.decoding.name == "origin":
            return True  # tosses a coin for each position
        if len(masked):
            return False
        if isinstance(options.decoding, EditingDecoding):
            return True
        # Some policies only fill one position in the first step of a block if logits predict the next position.
        return options.reuse.due(canvas.candidates(), canvas.progress) is not None

    def _propose(self, reading: Reading, tokens: np.ndarray) -> None:
        canvas, case, template = self.state.canvas, self.case, self.state.feature(Template)
        rng = np.random.default_rng((zlib.crc32(tokens.tobytes()), case.seed, canvas.block))
        size = len(canvas)
        proposed = np.where(rng.random(size) < case.ends, EOS, rng.integers(MASK + 1, SIZE, size))
        prob = CONFIDENCE[case.confidence](rng, size, np.count_nonzero(tokens == MASK))
        noted = rng.random((self.state.noted, size))
        if case.options.decoding.name == "credit":
            noted[0] = proposed
        at, ends = reading.positions, rng.random(size) < case.ends
        if canvas.unread:
            proposed = canvas.tokens
        elif template is not None:
            for position in at.tolist():
                if (found := template.holes.between(position)) is not None:
                    automaton, states = found
                    row = np.zeros((1, -(-SIZE // 32)), np.int32)
                    automaton.mark(row, [states])
                    fitting = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
                    assert len(fitting)
                    can_end = EOS in fitting and ends[position]
                    proposed[position] = EOS if can_end else fitting[proposed[position] % len(fitting)]
        reading.proposal = Proposal(
            proposed[at].astype(np.int64), -rng.random(size)[at], prob[at], noted[:, at] if len(noted) else None
        )
        if case.logprobs:
            reading.logprobs = [Logprobs(np.array([token]), np.array([-1.0]), 1) for token in proposed[at]]

    def _apply(self, commit: Commit) -> None:
        """In the scheduler, which must come to the worker's canvas"""
        self.canvas.apply(commit)
        self.canvas.hand_out(commit.left)
        theirs = self.state.canvas
        for name in ("block", "block_step", "step", "emitted", "cold", "written", "unread"):
            assert getattr(self.canvas, name) == getattr(theirs, name), name
        for name in ("tokens", "changed", "_begun"):
            assert np.array_equal(getattr(self.canvas, name), getattr(theirs, name)), name
        assert np.array_equal(self.canvas.confidence, theirs.confidence, equal_nan=True)
