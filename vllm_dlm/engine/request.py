"""One request as the engine sees it: its canvas, the block being denoised and where its schedule stands.

The canvas lives on the host as numpy: a step sends the rows it needs down and
gets a token, a score and a probability per candidate back, nothing more.
"""

from dataclasses import dataclass, field

import numpy as np

from vllm_dlm.engine.selected_keys import View
from vllm_dlm.options import Options
from vllm_dlm.plugins.decoding.base import Proposal, Turn
from vllm_dlm.plugins.reuse.base import Progress


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


@dataclass
class Denoising:
    """State of one request between steps."""

    req_id: str
    options: Options
    sampling: Sampling
    mask_id: int
    prompt_len: int
    canvas: np.ndarray  # [N] int64: prompt, then the response with masks where nothing is committed yet
    emitted: int  # response tokens already handed to vLLM; always whole blocks
    blocks: list[tuple[int, int]]
    logprobs: list  # per response position: what was recorded when it was committed
    shift: int = 0  # logits at i predict i + shift
    block: int = 0
    step: int = 0  # forwards of the current block so far
    block_start_step: int = 0  # forwards of the request before the current block
    block_prompt: np.ndarray | None = None  # the prompt as it was then
    cold: bool = True  # no forward since the start or a preemption
    changed: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # by the last commit
    quotas: list[int] = field(default_factory=list)  # of the current block
    filled: int = 0  # positions filled since the current block was opened
    most_steps: int = 0  # forwards after which the current block must be finished
    views: dict[int, View | None] = field(default_factory=dict)  # of each stream: what its response may see

    @classmethod
    def start(
        cls, req_id, options, sampling, mask_id, prompt_len, token_ids, length, shift=0, before=None
    ) -> "Denoising":
        """A new request, or one resumed after preemption with the blocks it had already emitted.

        `length` is that of the whole canvas, `before` the state of the request when it was preempted. What it had
        committed in an unfinished block is gone; since noise depends on (seed, block, step, position) the block
        comes out the same.
        """
        canvas = np.full(length, mask_id, dtype=np.int64)
        canvas[: len(token_ids)] = token_ids
        if before is not None:  # masks of the prompt were filled in the blocks that are out
            canvas[:prompt_len] = before.block_prompt
        blocks = options.decoding.blocks(length - prompt_len)
        state = cls(
            req_id,
            options,
            sampling,
            mask_id,
            prompt_len,
            canvas,
            emitted=len(token_ids) - prompt_len,
            blocks=blocks,
            logprobs=[None] * (length - prompt_len),
            shift=shift,
            block_start_step=0 if before is None else before.block_start_step,
        )
        state.block = next(i for i, (start, _) in enumerate(blocks) if start >= state.emitted)
        state._open_block()
        return state

    def __len__(self) -> int:
        return len(self.canvas)

    @property
    def streams(self) -> int:
        """Canvases denoised side by side: classifier-free guidance adds one with the prompt masked."""
        return 2 if self.options.decoding.cfg_scale > 0 else 1

    def _open_block(self) -> None:
        self.block_prompt = self.canvas[: self.prompt_len].copy()
        decoding, candidates = self.options.decoding, self.candidates()
        masks = len(candidates)
        if not decoding.schedules_prompt_masks:
            masks = int((candidates >= self.prompt_len).sum())
        steps = decoding.block_steps(self.block, len(self.blocks), masks)
        self.step, self.filled, self.quotas = 0, 0, decoding.quotas(masks, steps)
        self.most_steps = decoding.most_steps(len(candidates), len(self.quotas))

    def progress(self) -> Progress:
        start, end = self.blocks[self.block]
        return Progress(
            self.prompt_len,
            len(self),
            (self.prompt_len + start, self.prompt_len + end),
            self.step,
            self.block_start_step + self.step,
            self.cold,
            self.shift,
        )

    def _end(self) -> int:
        """First canvas position behind the current block."""
        return self.prompt_len + self.blocks[self.block][1]

    def candidates(self) -> np.ndarray:
        """Masked positions that may be filled now: all before the end of the current block. Masks that the
        prompt brought along take part (infilling), as they do in the references."""
        return np.flatnonzero(self.canvas[: self._end()] == self.mask_id)

    def unconditional(self) -> np.ndarray:
        """The canvas of the guidance stream: what was given is hidden, what was generated stays."""
        canvas = self.canvas.copy()
        canvas[: self.prompt_len] = self.mask_id
        return canvas

    # -- after a forward -------------------------------------------------------------------

    def commit(self, positions: np.ndarray, proposal: Proposal, logprobs: list | None) -> None:
        """Fill what the decoding algorithm chooses among `positions`, the candidates of this forward."""
        if self.step >= self.most_steps:
            decoding, reuse = self.options.decoding.name, self.options.reuse.name
            raise RuntimeError(
                f"block {self.block} is not finished after {self.step} steps of {decoding!r} with reuse {reuse!r}"
            )
        if not len(positions):
            self.step, self.cold, self.changed = self.step + 1, False, positions
            return
        rng = np.random.default_rng((self.sampling.seed, self.block, self.step))
        turn = Turn(self.step, len(self.quotas), sum(self.quotas[: self.step + 1]) - self.filled)
        chosen = self.options.decoding.choose(proposal, turn, rng)
        if turn.last and not self.options.decoding.parallel:
            # With masks in the prompt LLaDA's reference can run out of quota and return masks inside the
            # response; here the last step of a block fills what is left of it.
            inside = np.flatnonzero(positions >= self.prompt_len)
            chosen = np.union1d(chosen, inside)
        if len(due := self.options.reuse.due(positions, self.progress())):
            chosen = np.union1d(chosen, np.flatnonzero(np.isin(positions, due)))
        self.canvas[positions[chosen]] = proposal.token[chosen]
        self.changed, self.cold = positions[chosen], False
        if logprobs is not None:
            for index in chosen:
                if positions[index] >= self.prompt_len:
                    self.logprobs[positions[index] - self.prompt_len] = logprobs[index]
        self.step += 1
        self.filled += len(chosen)

    def take_output(self) -> tuple[list[int], list]:
        """Tokens (with their log-probabilities) that are final and were not handed out: a finished block,
        or everything up to an end token that nothing masked precedes."""
        response = self.canvas[self.prompt_len :]
        start, end = self.emitted, self.blocks[self.block][1]
        pending = response[start:end]
        masked = pending == self.mask_id
        known = int(masked.argmax()) if masked.any() else len(pending)
        stops = np.flatnonzero(np.isin(pending[:known], list(self.sampling.stop_ids)))
        if len(stops):
            known = int(stops[0]) + 1
        elif known < len(pending):
            return [], []
        self.emitted = start + known
        if not len(stops) and self.block + 1 < len(self.blocks):
            self.block += 1
            self.block_start_step += self.step
            self._open_block()
        return pending[:known].tolist(), self.logprobs[start : self.emitted]
