"""One request in the worker: its canvas, how it is sampled, and the schedule of its current canvas block.

The canvas lives on the host as numpy: a step sends the rows it needs down and
gets a token, a score and a probability per candidate back, nothing more.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from vllm_dlm.engine.canvas import NOTHING, Canvas, Commit
from vllm_dlm.engine.selected_keys import View
from vllm_dlm.options import Options
from vllm_dlm.plugins.decoding.base import Memory, Proposal, Turn


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


class Blocks(NamedTuple):
    """Ids of the KV blocks of one stream, in order."""

    kv: np.ndarray
    features: np.ndarray
    summaries: np.ndarray

    @classmethod
    def none(cls) -> "Blocks":
        return cls(NOTHING, NOTHING, NOTHING)


@dataclass
class Denoising:
    """State of one request between steps."""

    req_id: str
    canvas: Canvas
    sampling: Sampling
    logprobs: list = field(init=False)  # per response position: what was recorded when it was filled
    quotas: list[int] = field(init=False)  # of the current block: how many positions each step fills
    filled: int = field(init=False)  # positions filled since the current block was opened
    memory: Memory | None = field(init=False)  # of the decoding, for the current block
    most_steps: int = field(init=False)  # forwards after which the current block must be finished
    views: dict[int, View | None] = field(default_factory=dict)  # of each stream: what its response may see
    blocks: dict[int, Blocks] = field(default_factory=dict)  # of each stream
    rows: int = 0  # of the canvas that these blocks are for

    def __post_init__(self):
        self.logprobs = [None] * (len(self.canvas) - self.canvas.prompt_len)
        self._open_block()

    @property
    def options(self) -> Options:
        return self.canvas.options

    def _open_block(self) -> None:
        canvas, decoding = self.canvas, self.options.decoding
        candidates = canvas.candidates()
        masks = len(candidates)
        if not decoding.schedules_prompt_masks:
            masks = int((candidates >= canvas.prompt_len).sum())
        steps = decoding.block_steps(canvas.block, len(canvas.blocks), masks)
        self.filled, self.quotas = 0, decoding.quotas(masks, steps)
        self.memory = decoding.memory()
        self.most_steps = decoding.most_steps(len(candidates), len(self.quotas))

    # -- after a forward -------------------------------------------------------------------

    def commit(self, positions: np.ndarray, proposal: Proposal, logprobs: list | None, pressure: float = 0.0) -> Commit:
        """Fill what the decoding algorithm chooses among `positions`, the candidates of this forward."""
        canvas = self.canvas
        if canvas.block_step >= self.most_steps:
            decoding, reuse = self.options.decoding.name, self.options.reuse.name
            raise RuntimeError(
                f"block {canvas.block} is not finished after {canvas.block_step} steps of {decoding!r} "
                f"with reuse {reuse!r}"
            )
        chosen = self._chosen(positions, proposal, pressure) if len(positions) else NOTHING
        if self.memory is not None and proposal.noted is not None:
            self.memory.note(positions, proposal.noted)
        commit = Commit(positions, np.asarray(proposal.prob, np.float32), chosen, proposal.token[chosen])
        if logprobs is not None:
            for index in chosen:
                if positions[index] >= canvas.prompt_len:
                    self.logprobs[positions[index] - canvas.prompt_len] = logprobs[index]
        canvas.apply(commit)
        self.filled += len(chosen)
        return commit

    def _chosen(self, positions: np.ndarray, proposal: Proposal, pressure: float) -> np.ndarray:
        """Indices into `positions`, ascending."""
        canvas, decoding = self.canvas, self.options.decoding
        step = canvas.block_step
        masked = self._masked() if decoding.threshold_decay else 1.0
        turn = Turn(step, len(self.quotas), sum(self.quotas[: step + 1]) - self.filled, positions, masked, pressure)
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

    def _masked(self) -> float:
        """See Turn"""
        canvas = self.canvas
        start = canvas.progress.block[0]
        live = canvas.plan.live[np.searchsorted(canvas.plan.live, start) :]
        return np.count_nonzero(canvas.tokens[live] == canvas.mask_id) / (canvas.rows - start)

    def take_output(self) -> tuple[list[int], list[Any]]:
        """Tokens (with their log-probabilities) that are final and were not handed out: a finished block,
        or everything up to an end token that nothing masked precedes."""
        canvas = self.canvas
        start, block = canvas.emitted, canvas.block
        pending = canvas.tokens[canvas.prompt_len + start : canvas.end]
        masked = np.flatnonzero(pending == canvas.mask_id)
        known = int(masked[0]) if len(masked) else len(pending)
        if known == 0 and len(pending):
            return [], []
        tokens = pending[:known].tolist()
        ends = [index for index, token in enumerate(tokens) if token in self.sampling.stop_ids]
        if ends:
            tokens = tokens[: ends[0] + 1]
        elif known < len(pending):
            return [], []
        canvas.hand_out(len(tokens))
        if canvas.block > block:
            self._open_block()
        return tokens, self.logprobs[start : canvas.emitted]
