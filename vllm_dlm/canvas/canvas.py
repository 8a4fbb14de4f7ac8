"""A canvas and its progress through the schedule, kept identical in the scheduler and the worker.

The scheduler creates a canvas when its request is first in line and sends a copy
to the worker when the request starts. Both then apply the same commits and plan
the same next step without communicating. A preempted request restarts from the
scheduler's canvas.
"""

import copy
from functools import cached_property

import numpy as np

from vllm_dlm.canvas import block_causal, infill, revision, verification
from vllm_dlm.canvas.commit import NOTHING, Commit
from vllm_dlm.options import Options
from vllm_dlm.options.texts import NO_LAYOUT, Layout
from vllm_dlm.plugins.reuse.base import Progress, StepPlan

#: number of live rows that cost as much as one recomputed row, if layers only pass on their hidden states
LIVE_PER_ROW = 8

__all__ = ["NOTHING", "Canvas", "Commit"]


class Canvas:
    def __init__(
        self, options: Options, mask_id: int, shift: int, prompt: list[int], length: int, layout: Layout = NO_LAYOUT
    ):
        self.options = options = block_causal.fitted(options)
        self.mask_id, self.shift, self.layout = mask_id, shift, layout
        # Rows of a suffix precede those of the prompt and count as prompt rows, see infill.py.
        self.prompt_len, self.suffix = len(prompt), layout.suffix
        self.tokens = np.full(length, mask_id, dtype=np.int64)  # [N]
        self.tokens[: self.prompt_len] = layout.context(prompt)
        if (start := options.decoding.starting_tokens(length - self.prompt_len, mask_id)) is not None:
            self.tokens[self.prompt_len :] = start
        self.confidence = np.full(length, np.nan, dtype=np.float32)  # [N], see Progress
        self.filled_at = np.zeros(length, dtype=np.int64)  # [N], see Progress
        self.changed = NOTHING  # positions that the last step filled or masked again
        self.blocks = options.blocks(self.prompt_len, length)  # [start, end) within the response
        self.fixed = NOTHING  # positions of a template's fixed text
        self.unread = False  # the next step reads a starting text and masks its least probable tokens
        infill.lay_out(self)
        #: log-probabilities of a starting text by response position, if requested. They survive a preemption, because
        #: later steps do not read tokens that are kept.
        self.logprobs: list | None = None
        self.block = 0
        self.block_step = 0  # forwards of the current canvas block
        self.step = 0  # forwards of the request
        self.emitted = 0  # response tokens that were output: whole canvas blocks, except at the end
        self.cold = True  # no forward since the start or the last preemption
        self.written = 0  # see Progress
        self._begun = self.tokens.copy()  # tokens when the current block was opened

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def streams(self) -> int:
        """Number of streams with caches: classifier-free guidance adds one with the prompt masked."""
        return 2 if self.options.decoding.cfg_scale > 0 else 1

    @property
    def block_width(self) -> int:
        start, end = self.blocks[self.block]
        return end - start

    @property
    def end(self) -> int:
        """First position after the current block."""
        return self.prompt_len + self.blocks[self.block][1]

    @cached_property
    def rows(self) -> int:
        """Number of positions that have a row while the current block is decoded, counted from the start"""
        return self.options.extent.rows(self.end, len(self))

    @property
    def last(self) -> int:
        """The position that the last row represents"""
        return self.options.extent.last(self.end, len(self))

    @cached_property
    def positions(self) -> np.ndarray | None:
        """[N] positions that the rows represent; None: their own"""
        return infill.row_positions(self)

    @property
    def grown(self) -> bool:
        """The current block has added rows that no step has computed yet."""
        if self.block_step or not self.block:
            return False
        before = self.prompt_len + self.blocks[self.block - 1][1]
        return self.options.extent.rows(before, len(self)) != self.rows

    def copy(self) -> "Canvas":
        twin = copy.copy(self)
        twin.tokens, twin.confidence = self.tokens.copy(), self.confidence.copy()
        twin._begun, twin.filled_at = self._begun.copy(), self.filled_at.copy()
        twin._moved()
        return twin

    # -- the next step ---------------------------------------------------------------------

    @cached_property
    def progress(self) -> Progress:
        start, end = self.blocks[self.block]
        return Progress(
            prompt_len=self.prompt_len,
            first=self.suffix,
            length=self.rows,
            block=(self.prompt_len + start, self.prompt_len + end),
            block_step=self.block_step,
            step=self.step,
            cold=self.cold or self.grown,
            grown=self.grown and not self.cold,
            block_before=self.prompt_len + self.blocks[max(self.block - 1, 0)][0],
            shift=self.shift,
            mask_id=self.mask_id,
            tokens=self.tokens[: self.rows],
            confidence=self.confidence[: self.rows],
            changed=self.changed,
            written=self.written,
            filled_at=self.filled_at[: self.rows],
        )

    @cached_property
    def plan(self) -> StepPlan:
        return self.options.reuse.plan(self.progress)

    def make_plan(self) -> StepPlan:
        """Makes the plan of the next step now, so that an error of the policy is raised here."""
        return self.plan

    @property
    def weight(self) -> int:
        """Cost of the next step in rows, for the scheduler. Live rows that are not recomputed count less."""
        rows = max(self.plan.rows, -(-len(self.plan.live) // LIVE_PER_ROW), 1)
        return self.streams * (rows + revision.shadow_rows(self) + verification.shadow_rows(self))

    def finished(self) -> tuple[int, int] | None:
        """[start, end) of the current block's tokens that were not output yet, if none is masked"""
        start = self.prompt_len + self.emitted
        if start == len(self) or (self.tokens[start : self.end] == self.mask_id).any():
            return None
        return start, self.end

    def candidates(self) -> np.ndarray:
        """Masked positions that may be filled now: all before the end of the current block, including masks of the
        prompt (infilling), as in the references."""
        return np.flatnonzero(self.tokens[: self.end] == self.mask_id)

    # -- progress --------------------------------------------------------------------------

    def start_after(self, written: int) -> None:
        """Starts with final keys and values of the first `written` positions in the cache."""
        self.written = written
        self._moved()

    def _moved(self) -> None:
        for name in ("progress", "plan", "rows"):
            self.__dict__.pop(name, None)

    def apply(self, commit: Commit) -> None:
        """Applies the commit of a step."""
        reads = block_causal.reads(self)
        self.written = block_causal.written(self)
        self.tokens[commit.positions] = commit.tokens
        self.tokens[commit.revoked] = self.mask_id
        self.confidence[commit.read] = commit.confidence
        self.changed, self.cold = commit.changed, False
        self.block_step, self.step = self.block_step + (reads and not self.unread), self.step + 1
        if self.unread:
            self.unread, self._begun, self.logprobs = False, self.tokens.copy(), commit.logprobs
        self.filled_at[commit.positions] = self.step
        self._moved()

    def hand_out(self, count: int) -> None:
        """Counts `count` more positions as output and opens the next canvas block once the current one is output."""
        self.emitted += count
        while self.block + 1 < len(self.blocks) and self.emitted >= self.blocks[self.block][1]:
            self.block, self.block_step = self.block + 1, 0
            self._begun = self.tokens.copy()
        self._moved()

    def rewind(self) -> None:
        """Returns to the start of the current block after a preemption has dropped the caches. Noise depends only on
        (seed, block, step, position), so the block gets the same tokens."""
        self.tokens[:] = self._begun
        self.confidence[self.tokens == self.mask_id] = np.nan
        self.step, self.block_step, self.changed, self.cold = self.step - self.block_step, 0, NOTHING, True
        self.written = 0
        np.minimum(self.filled_at, self.step, out=self.filled_at)
        self._moved()
