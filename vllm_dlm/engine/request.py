"""One request in the worker: its canvas, how it is sampled, and the schedule of its current canvas block.

The canvas lives on the host as numpy: a step sends the rows it needs down and
gets a token, a score and a probability per candidate back, nothing more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from vllm_dlm.engine.canvas import NOTHING, Canvas, Commit
from vllm_dlm.engine.filling import closed, holes_of, in_order
from vllm_dlm.engine.holes import Holes
from vllm_dlm.engine.selected_keys import View
from vllm_dlm.options import Options
from vllm_dlm.plugins.decoding.base import Memory, Proposal, Turn, best


@dataclass(frozen=True)
class Sampling:
    """The part of vLLM's SamplingParams that a denoising step needs."""

    temperature: float
    top_p: float
    top_k: int  # 0: off
    seed: int
    stop_ids: frozenset[int]  # generation ends at the first of these with nothing masked before it
    num_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def filtered(self) -> bool:
        return self.top_p < 1 or self.top_k > 0


class Logprobs(NamedTuple):
    """Log-probabilities of one proposed token: itself first, then the most probable ones."""

    token_ids: np.ndarray  # [1 + n]
    values: np.ndarray  # [1 + n]
    rank: int

    @classmethod
    def certain(cls, token: int, count: int) -> "Logprobs":
        """Of a token that stood from the start"""
        ids = np.full(1 + max(count, 0), token)
        return cls(ids, np.zeros(len(ids)), 1)


class Read(Protocol):
    """A draft or a shadow of the canvas, once it has been read."""

    positions: np.ndarray  # [C]
    proposal: Proposal


class Blocks(NamedTuple):
    """Ids of the KV blocks of one stream, in order."""

    kv: np.ndarray
    features: np.ndarray
    summaries: np.ndarray
    drafts: np.ndarray  # of one draft after the other

    @classmethod
    def none(cls) -> "Blocks":
        return cls(NOTHING, NOTHING, NOTHING, NOTHING)


@dataclass
class Denoising:
    """State of one request between steps."""

    req_id: str
    canvas: Canvas
    sampling: Sampling
    logprobs: list = field(init=False)  # per response position: what was recorded when it was filled
    quotas: list[int] = field(init=False)  # of the current block: how many positions each step fills
    filled: int = field(init=False)  # positions filled in the current block, as `quotas` count them
    #: masks and what was proposed for them last, the most probable first: what drafts fill
    guesses: list[tuple[int, int]] = field(init=False)
    drafted: int = field(init=False, default=-1)  # the canvas block whose surroundings drafts have
    memory: Memory | None = field(init=False)  # of the decoding, for the current block
    settled: bool = field(init=False)  # no token of the current block can change except masks, see _open_block
    most_steps: int = field(init=False)  # forwards after which the current block must be finished
    holes: Holes | None = field(init=False)  # of its template
    views: dict[int, View | None] = field(default_factory=dict)  # of each stream: what its response may see
    blocks: dict[int, Blocks] = field(default_factory=dict)  # of each stream
    rows: int = 0  # of the canvas that these blocks are for

    def __post_init__(self):
        canvas = self.canvas
        self.logprobs = list(canvas.logprobs or [None] * (len(canvas) - canvas.prompt_len))
        self.holes = holes_of(self.canvas)
        self._open_block()

    @property
    def options(self) -> Options:
        return self.canvas.options

    def _open_block(self) -> None:
        canvas, decoding = self.canvas, self.options.decoding
        masks = self._scheduled_masks()
        steps = decoding.block_steps(canvas.block, len(canvas.blocks), masks)
        self.filled, self.quotas = 0, decoding.quotas(masks, steps)
        self.memory, self.guesses = decoding.memory(), []
        # A decoding that edits decides itself. One that revokes must have judged the tokens of a starting text.
        self.settled = not decoding.edits and not len(canvas.standing)
        self.most_steps = decoding.most_steps(len(canvas.candidates()), len(self.quotas))

    def _scheduled_masks(self) -> int:
        """Masks that the schedule of the current block counts"""
        canvas, candidates = self.canvas, self.canvas.candidates()
        if self.options.decoding.schedules_prompt_masks:
            return len(candidates)
        return int((candidates >= canvas.prompt_len).sum())

    def _adjust_schedule(self) -> None:
        """Lays out the remaining steps again if more positions are filled than the schedule wanted by now, e.g. because
        a hole has ended early. So the quota of a step is at least 1 while masks are left, and never above their number.
        A schedule that is met stays the published one."""
        step = self.canvas.block_step
        made = self.quotas[:step]
        if self.filled <= sum(made) and step < len(self.quotas):
            return
        masks, left = self._scheduled_masks(), max(len(self.quotas) - step, 1)
        made += [0] * (step - len(made))
        self.filled = sum(made)
        self.quotas = made + (self.options.decoding.quotas(masks, left) if masks else [])

    # -- after a forward -------------------------------------------------------------------

    def commit(
        self, positions: np.ndarray, proposal: Proposal, logprobs: list | None, pressure: float = 0.0,
        drafts: Sequence[Read] = (), shadow: Read | None = None,
    ) -> Commit:  # fmt: skip
        """Fills what the decoding algorithm chooses among `positions`, the candidates of this forward, and what it
        chooses in each of the `drafts` that has guessed right. Tokens of the block may become masks again, depending
        on what was read at its `shadow`."""
        canvas = self.canvas
        if canvas.unread:
            return self._read_draft(positions, proposal, logprobs)
        if canvas.block_step >= self.most_steps:
            decoding, reuse = self.options.decoding.name, self.options.reuse.name
            raise RuntimeError(
                f"block {canvas.block} is not finished after {canvas.block_step} steps of {decoding!r} "
                f"with reuse {reuse!r}"
            )
        before = canvas.tokens[positions]
        chosen = self._chosen(positions, proposal, pressure) if len(positions) else NOTHING
        if self.holes is not None and len(chosen):
            order = in_order(chosen, proposal.prob, before != canvas.mask_id)
            chosen = self.holes.accepted(positions, proposal.token, order)
        if self.memory is not None and proposal.noted is not None:
            self.memory.note(positions, proposal.noted)
        commit = Commit(positions, np.asarray(proposal.prob, np.float32), chosen, proposal.token[chosen])
        if self.options.canvases > 1 and len(positions):
            commit = self._followed(commit, proposal, drafts, pressure)
        if self.options.decoding.revokes and (len(positions) or not self.settled):
            commit = replace(commit, revoked=self._revoked(len(chosen), shadow))
        if self.holes is not None:
            commit = closed(commit, self.holes)
        if logprobs is not None:
            for index in chosen if self.holes else commit.filled:
                if positions[index] >= canvas.prompt_len:
                    self.logprobs[positions[index] - canvas.prompt_len] = logprobs[index]
        canvas.apply(commit)
        self.filled += int((commit.positions < canvas.end).sum())
        self._adjust_schedule()
        if self.options.decoding.edits:
            # No block waits for masks of the prompt: partial steps of some policies have no rows there.
            masks = int((canvas.candidates() >= canvas.prompt_len).sum())
            if len(positions):
                turn = self._turn(positions, 0.0, before)
                self.settled = self.options.decoding.settled(masks, chosen, turn, self.memory)
            elif not masks:  # and no position that a partial step of this policy could read
                self.settled = True
        return commit

    def _read_draft(self, positions: np.ndarray, proposal: Proposal, logprobs: list | None) -> Commit:
        """The least probable tokens of the starting text become masks, and denoising begins."""
        canvas, prob = self.canvas, np.asarray(proposal.prob, np.float32)
        doubted = np.sort(best(-prob, round(canvas.layout.remask * len(positions))))
        commit = Commit(positions, prob, NOTHING, NOTHING, positions[doubted])
        if logprobs is not None:
            for index, position in enumerate(positions.tolist()):
                self.logprobs[position - canvas.prompt_len] = logprobs[index]
            commit = replace(commit, logprobs=list(self.logprobs))
        canvas.apply(commit)
        self._open_block()
        return commit

    def _followed(self, commit: Commit, proposal: Proposal, drafts: Sequence[Read], pressure: float) -> Commit:
        """The commit, and those of the drafts that filled nothing else than what comes true."""
        filled = dict(zip(commit.positions.tolist(), commit.tokens.tolist(), strict=True))
        confidence, read, at = commit.confidence.copy(), commit.read, 0
        while at < len(drafts):
            came_true = 0
            for position, token in self.guesses[at : len(drafts)]:
                if filled.get(position) != token:
                    break
                came_true += 1
            if not came_true:
                break
            at += came_true
            read, proposal = drafts[at - 1].positions, drafts[at - 1].proposal
            confidence[np.searchsorted(commit.read, read)] = proposal.prob
            chosen = self._chosen(read, proposal, pressure)
            found = zip(read[chosen].tolist(), proposal.token[chosen].tolist(), strict=True)
            filled = dict(self.guesses[:at]) | dict(found)
        order = np.argsort(-proposal.prob, kind="stable")
        pairs = zip(read[order].tolist(), proposal.token[order].tolist(), strict=True)
        self.guesses = [(position, token) for position, token in pairs if position not in filled]
        where = np.array(sorted(filled), np.int64)
        tokens = np.array([filled[position] for position in where.tolist()], np.int64)
        return Commit(commit.read, confidence, np.searchsorted(commit.read, where), tokens)

    def _revoked(self, filled: int, shadow: Read | None) -> np.ndarray:
        canvas, decoding, noted, positions = self.canvas, self.options.decoding, None, NOTHING
        if shadow is not None:
            noted, positions = shadow.proposal.noted, shadow.positions
        noted = np.zeros((decoding.noted, 0)) if noted is None else noted
        revoked = np.sort(positions[decoding.revoked(noted, filled, self.memory, unjudged=not self.settled)])
        # The first step of a block may read one position alone, see Reuse.due. The second one reads the others.
        self.settled = self.settled or canvas.block_step > 0 or len(positions) == len(canvas.standing)
        return revoked

    def _chosen(self, positions: np.ndarray, proposal: Proposal, pressure: float) -> np.ndarray:
        """Indices into `positions`, ascending."""
        canvas, decoding = self.canvas, self.options.decoding
        step, turn = canvas.block_step, self._turn(positions, pressure, canvas.tokens[positions])
        rng = partial(np.random.default_rng, (self.sampling.seed, canvas.block, step))
        chosen = decoding.choose(proposal, turn, rng)
        if turn.last and not decoding.parallel:
            # With masks in the prompt LLaDA's reference can run out of quota and return masks inside the
            # response; here the last step of a block fills what is left of it.
            inside = np.flatnonzero(positions >= canvas.prompt_len)
            chosen = np.union1d(chosen, inside)
        if len(due := self.options.reuse.due(positions, canvas.progress)):
            chosen = np.union1d(chosen, np.flatnonzero(np.isin(positions, due)))
        return np.sort(chosen)

    def _turn(self, positions: np.ndarray, pressure: float, tokens: np.ndarray) -> Turn:
        canvas, step = self.canvas, self.canvas.block_step
        masked = self._masked() if self.options.decoding.threshold_decay else 1.0
        quota = sum(self.quotas[: step + 1]) - self.filled
        turn = Turn(step, len(self.quotas), min(quota, len(positions)), positions, masked, pressure)
        if not self.options.decoding.edits:
            return turn
        return turn._replace(standing=tokens != canvas.mask_id, tokens=tokens)

    def _masked(self) -> float:
        """See Turn"""
        canvas = self.canvas
        start = canvas.progress.block[0]
        live = canvas.plan.live[np.searchsorted(canvas.plan.live, start) :]
        return np.count_nonzero(canvas.tokens[live] == canvas.mask_id) / (canvas.rows - start)

    def take_output(self) -> tuple[list[int], list[Any]]:
        """Tokens (with their log-probabilities) that are final and were not handed out."""
        if self.holes is not None:
            return self._take_text(self.holes)
        tokens, records = self._take_block()
        # blocks of a draft may have no masks
        while self.canvas.layout.start and tokens and tokens[-1] not in self.sampling.stop_ids:
            more, of_more = self._take_block()
            if not more:
                break
            tokens, records = tokens + more, records + of_more
        return tokens, records

    def _take_block(self) -> tuple[list[int], list[Any]]:
        """A finished block, or everything up to an end token that nothing masked precedes, where tokens stay once they
        are filled."""
        canvas = self.canvas
        start, block = canvas.emitted, canvas.block
        pending = canvas.tokens[canvas.prompt_len + start : canvas.end]
        masked = np.flatnonzero(pending == canvas.mask_id)
        known = int(masked[0]) if len(masked) else len(pending)
        if (known == 0 and len(pending)) or not self.settled:
            return [], []
        tokens = pending[:known].tolist()
        ends = [index for index, token in enumerate(tokens) if token in self.sampling.stop_ids]
        if known < len(pending) and (self.options.decoding.revokes or not ends):
            return [], []
        if ends:
            tokens = tokens[: ends[0] + 1]
        canvas.hand_out(len(tokens))
        if canvas.block > block:
            self._open_block()
        return tokens, self.logprobs[start : canvas.emitted]

    def _take_text(self, holes: Holes) -> tuple[list[int], list[Any]]:
        """Of a template: all canvas blocks that are finished, without the ends of holes; at the end the answer's."""
        canvas, tokens, records = self.canvas, list[int](), list[Any]()
        while self.settled and (block := canvas.finished()) is not None:
            for position in range(*block):
                if not holes.ended(position):
                    tokens.append(int(canvas.tokens[position]))
                    records.append(self.logprobs[position - canvas.prompt_len])
            before = canvas.block
            canvas.hand_out(block[1] - block[0])
            if canvas.block > before:
                self._open_block()
        if canvas.emitted == len(canvas) - canvas.prompt_len:
            tokens.append(canvas.layout.ends[0])
            records.append(None)
        if (count := self.sampling.num_logprobs) is not None:
            pairs = zip(tokens, records, strict=True)
            records = [record or Logprobs.certain(token, count) for token, record in pairs]
        return tokens, records
