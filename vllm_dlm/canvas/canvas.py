"""A canvas and where it stands in its schedule: the one clock, the same in the scheduler and in the worker.

The scheduler makes a canvas when its request is first in line and hands a copy
to the worker when the request starts. From then on both apply the same
commits, so both plan the same next step without talking about it; a request
that was preempted starts again from the scheduler's canvas.
"""

import copy
from functools import cached_property

import numpy as np

from vllm_dlm.canvas import block_causal, infill, revision
from vllm_dlm.canvas.commit import NOTHING, Commit
from vllm_dlm.canvas_texts import NO_LAYOUT, Layout
from vllm_dlm.options import Options
from vllm_dlm.plugins.reuse.base import Progress, StepPlan

#: live rows only carry a hidden state through layers that skip them; so many weigh as one that is recomputed
LIVE_PER_ROW = 8

__all__ = ["NOTHING", "Canvas", "Commit"]


class Canvas:
    def __init__(
        self, options: Options, mask_id: int, shift: int, prompt: list[int], length: int, layout: Layout = NO_LAYOUT
    ):
        self.options = options = block_causal.fitted(options)
        self.mask_id, self.shift, self.layout = mask_id, shift, layout
        # Rows of a suffix come before those of the prompt and count as rows of the prompt, see infill.py.
        self.prompt_len, self.suffix = len(prompt), layout.suffix
        self.tokens = np.full(length, mask_id, dtype=np.int64)  # [N]
        self.tokens[: self.prompt_len] = layout.context(prompt)
        if (start := options.decoding.starting_tokens(length - self.prompt_len, mask_id)) is not None:
            self.tokens[self.prompt_len :] = start
        self.confidence = np.full(length, np.nan, dtype=np.float32)  # [N], see Progress
        self.changed = NOTHING  # positions that the last step filled, or made masks again
        self.blocks = options.blocks(self.prompt_len, length)  # [start, end) within the response
        self.fixed = NOTHING  # positions of a template's text
        self.unread = False  # the next step reads a starting text, and makes masks of tokens that it doubts
        infill.lay_out(self)
        #: log-probabilities of a starting text, by position of the response, if the request wants some. They are kept
        #: for a request that is preempted, since later steps do not read tokens that stay.
        self.logprobs: list | None = None
        self.block = 0
        self.block_step = 0  # forwards of the current canvas block
        self.step = 0  # forwards of the request
        self.emitted = 0  # tokens of the response that were handed out: whole blocks, but for the last time
        self.cold = True  # no forward since the start or a preemption
        self.written = 0  # see Progress
        self._begun = self.tokens.copy()  # when the current block was opened

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def streams(self) -> int:
        """Canvases denoised side by side: classifier-free guidance adds one with the prompt masked."""
        return 2 if self.options.decoding.cfg_scale > 0 else 1

    @property
    def block_width(self) -> int:
        start, end = self.blocks[self.block]
        return end - start

    @property
    def end(self) -> int:
        """First position behind the current block."""
        return self.prompt_len + self.blocks[self.block][1]

    @cached_property
    def rows(self) -> int:
        """Number of positions that have a row while the current block is decoded, counted from the start"""
        return self.options.extent.rows(self.end, len(self))

    @property
    def last(self) -> int:
        """The position that the last row stands for"""
        return self.options.extent.last(self.end, len(self))

    @cached_property
    def positions(self) -> np.ndarray | None:
        """[N] positions that the rows stand for; None: every row stands for its own"""
        return infill.row_positions(self)

    @property
    def grown(self) -> bool:
        """With the current block rows have come in that no step has seen."""
        if self.block_step or not self.block:
            return False
        before = self.prompt_len + self.blocks[self.block - 1][1]
        return self.options.extent.rows(before, len(self)) != self.rows

    def copy(self) -> "Canvas":
        twin = copy.copy(self)
        twin.tokens, twin.confidence = self.tokens.copy(), self.confidence.copy()
        twin._begun = self._begun.copy()
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
        )

    @cached_property
    def plan(self) -> StepPlan:
        return self.options.reuse.plan(self.progress)

    @property
    def weight(self) -> int:
        """Rows of the next step as the scheduler counts them. Rows that are carried through layers and not recomputed
        count less."""
        rows = max(self.plan.rows, -(-len(self.plan.live) // LIVE_PER_ROW), 1)
        return self.streams * (rows + revision.shadow_rows(self))

    def finished(self) -> tuple[int, int] | None:
        """[start, end) of what the current block has to hand out, if nothing in it is masked"""
        start = self.prompt_len + self.emitted
        if start == len(self) or (self.tokens[start : self.end] == self.mask_id).any():
            return None
        return start, self.end

    def candidates(self) -> np.ndarray:
        """Masked positions that may be filled now: all before the end of the current block. Masks that the
        prompt brought along take part (infilling), as they do in the references."""
        return np.flatnonzero(self.tokens[: self.end] == self.mask_id)

    # -- the clock moves -------------------------------------------------------------------

    def begin_behind(self, written: int) -> None:
        """The first `written` positions have final keys and values before the first step."""
        self.written = written
        self._moved()

    def _moved(self) -> None:
        for name in ("progress", "plan", "rows"):
            self.__dict__.pop(name, None)

    def apply(self, commit: Commit) -> None:
        """A step has been made."""
        reads = block_causal.reads(self)
        self.written = block_causal.written(self)
        self.tokens[commit.positions] = commit.tokens
        self.tokens[commit.revoked] = self.mask_id
        self.confidence[commit.read] = commit.confidence
        self.changed, self.cold = commit.changed, False
        self.block_step, self.step = self.block_step + (reads and not self.unread), self.step + 1
        if self.unread:
            self.unread, self._begun, self.logprobs = False, self.tokens.copy(), commit.logprobs
        self._moved()

    def hand_out(self, count: int) -> None:
        """So many more positions are out. Blocks leave whole, so that tells the current one."""
        self.emitted += count
        while self.block + 1 < len(self.blocks) and self.emitted >= self.blocks[self.block][1]:
            self.block, self.block_step = self.block + 1, 0
            self._begun = self.tokens.copy()
        self._moved()

    def rewind(self) -> None:
        """The caches are gone, and with them what was filled in the unfinished block. Since noise depends on (seed,
        block, step, position) the block comes out the same."""
        self.tokens[:] = self._begun
        self.confidence[self.tokens == self.mask_id] = np.nan
        self.step, self.block_step, self.changed, self.cold = self.step - self.block_step, 0, NOTHING, True
        self.written = 0
        self._moved()
