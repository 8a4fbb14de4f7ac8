"""One request in the worker: its canvas, its features, and the schedule of its current canvas block.

The canvas is in numpy arrays on the host. A step sends the rows that it needs to the device and gets one token, score
and probability per candidate back.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from vllm_dlm.canvas.block_causal import BlockCausalAttention
from vllm_dlm.canvas.caches import Blocks, StreamCaches
from vllm_dlm.canvas.canvas import Canvas
from vllm_dlm.canvas.commit import NOTHING, Commit
from vllm_dlm.canvas.end_stop import EndStop
from vllm_dlm.canvas.feature import Feature, Output, Room
from vllm_dlm.canvas.guidance import Guidance
from vllm_dlm.canvas.infill import StartingText, Template
from vllm_dlm.canvas.revision import Editing, Revocation
from vllm_dlm.canvas.selected_keys import SelectedKeys
from vllm_dlm.canvas.speculation import Speculation
from vllm_dlm.canvas.stream import Logprobs, Reading, Sampling, Stream, contained
from vllm_dlm.canvas.verification import Verification
from vllm_dlm.options import Options
from vllm_dlm.plugins.decoding.base import Memory, Proposal, Turn

__all__ = ["Denoising", "Logprobs", "Sampling"]

#: in the order in which they add streams and absorb readings
FEATURES: tuple[type[Feature], ...] = (
    Editing,
    StartingText,
    Guidance,
    BlockCausalAttention,
    Template,
    Speculation,
    Revocation,
    Verification,
    EndStop,
)


@dataclass
class Denoising:
    """State of one request between steps."""

    req_id: str
    canvas: Canvas
    sampling: Sampling
    features: list[Feature] = field(init=False)
    logprobs: list = field(init=False)  # per response position: record of the step that filled it
    quotas: list[int] = field(init=False)  # number of positions that each step of the current block fills
    filled: int = field(init=False)  # positions filled in the current block, as `quotas` count them
    memory: Memory | None = field(init=False)  # state of the decoding for the current block
    most_steps: int = field(init=False)  # forwards after which the current block must be finished
    pressure: float = 0.0  # share of the server's requests that are waiting in this step
    selected: dict[int, SelectedKeys | None] = field(default_factory=dict)  # by number of the stream, see `cached`
    blocks: dict[int, Blocks] = field(default_factory=dict)  # by number of the stream
    rows: int = 0  # canvas rows that these blocks cover

    def __post_init__(self):
        canvas = self.canvas
        self.logprobs = list(canvas.logprobs or [None] * (len(canvas) - canvas.prompt_len))
        self.features = [feature(canvas) for feature in FEATURES if feature.applies(canvas)]
        self._open_schedule()

    @property
    def options(self) -> Options:
        return self.canvas.options

    @property
    def settled(self) -> bool:
        """Whether only masks of the current canvas block can still change."""
        return all(feature.settled for feature in self.features)

    @property
    def noted(self) -> int:
        """Number of values per row that the decoding's `propose` notes"""
        return 0 if self.memory is None else self.memory.noted

    # -- the schedule of a canvas block ----------------------------------------------------

    def open_block(self) -> None:
        for feature in self.features:
            feature.open_block(self.canvas)
        self._open_schedule()

    def _open_schedule(self) -> None:
        canvas, decoding = self.canvas, self.options.decoding
        masks = self._scheduled_masks()
        steps = decoding.block_steps(canvas.block, len(canvas.blocks), masks)
        self.filled, self.quotas, self.memory = 0, decoding.quotas(masks, steps), decoding.memory()
        self.most_steps = decoding.most_steps(len(canvas.candidates()), len(self.quotas))

    def _scheduled_masks(self) -> int:
        """Masks that the schedule of the current block counts"""
        return self.options.decoding.scheduled(self.canvas.candidates(), self.canvas.prompt_len)

    def _adjust_schedule(self) -> None:
        """Recomputes the quotas of the remaining steps if more positions are filled than planned so far, for example
        because a hole ended early. The quota of a step is then at least 1 while masks are left and never above their
        number. Otherwise the published schedule is kept."""
        step = self.canvas.block_step
        made = self.quotas[:step]
        if self.filled <= sum(made) and step < len(self.quotas):
            return
        masks, left = self._scheduled_masks(), max(len(self.quotas) - step, 1)
        made += [0] * (step - len(made))
        self.filled = sum(made)
        self.quotas = made + (self.options.decoding.quotas(masks, left) if masks else [])

    # -- before a forward ------------------------------------------------------------------

    def streams(self, caches: StreamCaches, table: np.ndarray, canvases: int = 1) -> list[Stream]:
        """The streams of the next step. `table`: ids of the request's KV blocks; `canvases`: maximum number of streams
        if it speculates"""
        if self.rows != self.canvas.rows:
            caches.grow(self, table)
        made, room = self.read([self._own_stream()], self.canvas.candidates()), Room(caches, canvases)
        for feature in self.features:
            made = feature.streams(self, made, room)
        return made

    def _own_stream(self) -> Stream:
        """The stream of the canvas itself"""
        canvas, reuse = self.canvas, self.options.reuse
        at = canvas.progress
        return Stream(
            reuse=reuse,
            plan=canvas.plan,
            token_ids=at.tokens,
            head_positions=NOTHING,
            changed=canvas.changed,
            response=at.response,
            feature_rows=reuse.feature_rows(at.prompt_len, at.length),
            last=canvas.last,
            positions=canvas.positions,
            request=self.req_id,
            **self.cached(0),
        )

    def cached(self, number: int) -> dict[str, Any]:
        """Fields of a stream that depend on its caches. `number`: 0 for the canvas, 1 for the unconditional stream"""
        canvas, selected, filtered, chooses = self.canvas, self.selected[number], False, False
        if selected is not None:
            filtered = not self.options.reuse.caches and not canvas.cold
            chooses = (filtered or not canvas.plan.whole(canvas.rows)) and selected.step_begins()
        return {
            "kv_table": self.blocks[number].kv if self.options.caches else None,
            "feature_table": self.blocks[number].features,
            "selected": selected,
            "filtered": filtered,
            "chooses": chooses,
        }

    def read(self, made: list[Stream], positions: np.ndarray, judged: bool = False) -> list[Stream]:
        """Adds a reading of the given positions, as far as their rows are live, to the canvas's own stream."""
        (stream,) = made
        at = self.canvas.progress
        if not judged and (due := self.options.reuse.due(positions, at)) is not None:
            positions = due
        positions = positions[contained(stream.plan.live, at.rows_reading(positions))]
        stream.reading, stream.head_positions = Reading(self, positions, judged=judged), self.head_rows(positions)
        return [stream]

    def head_rows(self, positions: np.ndarray) -> np.ndarray:
        """Rows that predict the positions, ascending. One row may predict two positions."""
        at = self.canvas.progress
        rows = at.rows_reading(positions)
        return np.unique(rows) if at.shift else rows

    # -- after a forward -------------------------------------------------------------------

    def commit(self, reading: Reading, pressure: float = 0.0) -> Commit:
        """Applies the result of a reading to the canvas: the tokens that the decoding chooses, as changed by the
        features."""
        canvas, self.pressure = self.canvas, pressure
        for feature in self.features:
            if (commit := feature.take_over(self, reading)) is not None:
                canvas.apply(commit)
                self.open_block()
                return commit
        if canvas.block_step >= self.most_steps:
            decoding, reuse = self.options.decoding.name, self.options.reuse.name
            raise RuntimeError(
                f"block {canvas.block} is not finished after {canvas.block_step} steps of {decoding!r} "
                f"with reuse {reuse!r}"
            )
        absorbed = self._decoded(reading)
        for feature in self.features:
            absorbed = feature.absorb(self, absorbed, reading)
        self._record(absorbed, reading)
        commit = absorbed
        for feature in self.features:
            commit = feature.finish(self, commit)
        canvas.apply(commit)
        self.filled += int((commit.positions < canvas.end).sum())
        self._adjust_schedule()
        for feature in self.features:
            feature.applied(self, absorbed, reading)
        return commit

    def _decoded(self, reading: Reading) -> Commit:
        """Commit of the tokens that the decoding chooses, before features change it"""
        positions, proposal = reading.positions, reading.proposal
        chosen = self.choose(positions, proposal) if len(positions) else NOTHING
        if self.memory is not None and proposal.noted is not None:
            self.memory.note(positions, proposal.noted)
        return Commit(positions, np.asarray(proposal.prob, np.float32), chosen, proposal.token[chosen])

    def _record(self, commit: Commit, reading: Reading) -> None:
        if reading.logprobs is None:
            return
        for index in commit.filled:
            if reading.positions[index] >= self.canvas.prompt_len:
                self.logprobs[reading.positions[index] - self.canvas.prompt_len] = reading.logprobs[index]

    def choose(self, positions: np.ndarray, proposal: Proposal) -> np.ndarray:
        """Indices into `positions` (candidates) to fill, ascending"""
        canvas, decoding = self.canvas, self.options.decoding
        turn = self._turn(positions)
        rng = partial(np.random.default_rng, (self.sampling.seed, canvas.block, canvas.block_step))
        chosen = decoding.choose(proposal, turn, rng)
        if self.options.reuse.due(positions, canvas.progress) is not None:
            return np.arange(len(positions))
        return np.sort(chosen)

    def _turn(self, positions: np.ndarray) -> Turn:
        canvas, step = self.canvas, self.canvas.block_step
        masked = self._masked() if self.options.decoding.threshold_decay else 1.0
        quota = sum(self.quotas[: step + 1]) - self.filled
        tokens = canvas.tokens[positions]
        return Turn(
            step,
            len(self.quotas),
            min(quota, len(positions)),
            positions,
            masked,
            self.pressure,
            tokens != canvas.mask_id,
            tokens,
            canvas.prompt_len,
        )

    def _masked(self) -> float:
        """See Turn.masked"""
        canvas = self.canvas
        start = canvas.progress.block[0]
        live = canvas.plan.live[np.searchsorted(canvas.plan.live, start) :]
        return np.count_nonzero(canvas.tokens[live] == canvas.mask_id) / (canvas.rows - start)

    # -- output ----------------------------------------------------------------------------

    def take_output(self) -> Output:
        """Tokens (with their log-probabilities) that are final and were not output yet"""
        for feature in self.features:
            if (output := feature.output(self)) is not None:
                return output
        return self.take_block()

    def take_block(self) -> Output:
        """A finished block; or, if filled tokens cannot be revoked, everything up to an end token without a mask before
        it"""
        canvas = self.canvas
        start = canvas.emitted
        pending = canvas.tokens[canvas.prompt_len + start : canvas.end]
        masked = np.flatnonzero(pending == canvas.mask_id)
        known = int(masked[0]) if len(masked) else len(pending)
        if (known == 0 and len(pending)) or not self.settled:
            return [], []
        tokens = pending[:known].tolist()
        ends = [index for index, token in enumerate(tokens) if token in self.sampling.stop_ids]
        if known < len(pending) and (not ends or self.feature(Revocation) is not None):
            return [], []
        if ends:
            tokens = tokens[: ends[0] + 1]
        self.hand_out(len(tokens))
        return tokens, self.logprobs[start : canvas.emitted]

    def hand_out(self, count: int) -> None:
        """Counts `count` more positions as output; opens the next canvas block if the current one is complete."""
        block = self.canvas.block
        self.canvas.hand_out(count)
        if self.canvas.block > block:
            self.open_block()

    def feature(self, kind: type[Feature]) -> Any:
        """The request's feature of this kind, or None"""
        return next((feature for feature in self.features if isinstance(feature, kind)), None)
