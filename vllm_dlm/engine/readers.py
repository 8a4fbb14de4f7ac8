"""Which canvases a step reads for a request: its own, its guidance twin's, drafts, shadows; or the parts of one."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from vllm_dlm.cache.budget import BlockShape
from vllm_dlm.client_cache import ClientCache
from vllm_dlm.engine.canvas import NOTHING
from vllm_dlm.engine.head import HeadRequest
from vllm_dlm.engine.packing import Stream
from vllm_dlm.engine.request import Blocks, Denoising
from vllm_dlm.engine.selected_keys import ChoicePool, View
from vllm_dlm.engine.shadow import shadow
from vllm_dlm.plugins.reuse.base import Progress, Reuse, StepPlan
from vllm_dlm.plugins.selection.base import Selection


class Reader(NamedTuple):
    """A stream, and whose logits it gives."""

    stream: Stream
    request: HeadRequest
    guides: bool = False  # it is the request's guidance twin
    own: bool = True  # it is the request's canvas, not a draft or a shadow of it
    #: [2, n] blocks, and which ones get what they hold before anything is computed
    copies: np.ndarray | None = None

    @property
    def name(self) -> str:
        return self.request.state.req_id


class Readers:
    def __init__(self, shape: BlockShape):
        self.shape = shape
        self.choices: ClientCache[Selection, ChoicePool] = ClientCache("choice_pools")

    def of(self, state: Denoising, table: np.ndarray, canvases: int = 1) -> list[Reader]:
        """The request's canvas and, with guidance, its twin: two caches that never meet. Or with drafts, which share
        all but the canvas block. Or each with its shadow."""
        canvas, options = state.canvas, state.options
        at, plan, reuse = canvas.progress, canvas.plan, options.reuse
        positions = canvas.readable()
        if not canvas.unread:
            positions = reuse.candidates(positions, at)
        heads = at.rows_reading(positions)
        seen = held(plan.live, heads)
        request = HeadRequest(state, positions[seen])
        read = np.unique(heads[seen]) if at.shift else heads[seen]
        if state.rows != at.length:
            self._grow(state, table)
        if (sights := reuse.sights(plan.live)) is not None:
            return self._in_parts(request, read, sights)
        readers = []
        for twin in range(canvas.streams):
            own, view = state.blocks[twin], state.views[twin]
            filtered = view is not None and not reuse.caches and not canvas.cold
            stream = Stream(
                reuse=reuse,
                plan=plan,
                token_ids=canvas.unconditional() if twin else at.tokens,
                head_positions=read,
                changed=canvas.changed,
                response=at.response,
                feature_rows=reuse.feature_rows(at.prompt_len, at.length),
                kv_table=own.kv if options.caches else None,
                feature_table=own.features,
                view=view,
                filtered=filtered,
                chooses=view is not None and (filtered or not plan.whole(at.length)) and view.step_begins(),
                last=canvas.last,
                positions=canvas.positions,
            )
            readers.append(Reader(stream, request, bool(twin)))
        drafts = canvases > 1 and not plan.refresh and state.options.canvases > 1
        # a sampled token depends on its step, and a log-probability is that of the step that filled it
        if drafts and state.sampling.greedy and state.sampling.num_logprobs is None:
            readers += self._drafts(state, readers[0], canvases)
        judges = not state.settled or options.decoding.judges(state.memory)
        if judges and len(standing := self._readable(canvas.standing, at, plan, reuse)):
            request.shadow = HeadRequest(state, standing)
            readers += [
                Reader(shadow(reader.stream, standing, at), request.shadow, reader.guides, own=False)
                for reader in readers
            ]
        return readers

    def _in_parts(self, request: HeadRequest, read: np.ndarray, sights: list[tuple[np.ndarray, int]]) -> list[Reader]:
        """A stream for all rows that see as far, as if the canvas ended there. Only the last ones are read."""
        state = request.state
        canvas, readers = state.canvas, []
        for twin in range(canvas.streams):
            tokens = canvas.unconditional() if twin else canvas.progress.tokens
            for rows, end in sights:
                last = end == sights[-1][1]
                # Others read what is finished: prompts, and blocks that become final.
                view = self._view_of_final(state, twin) if last and len(read) else None
                response = canvas.progress.response if view is None else (int(rows[0]), end)
                stream = Stream(
                    canvas.options.reuse, StepPlan.dense(rows), tokens[:end], read if last else NOTHING, NOTHING,
                    response, kv_table=state.blocks[twin].kv, view=view,
                    chooses=view is not None and view.step_begins(),
                )  # fmt: skip
                readers.append(Reader(stream, request if last else HeadRequest(state, NOTHING), bool(twin), own=last))
        return readers

    @staticmethod
    def _readable(standing: np.ndarray, at: Progress, plan: StepPlan, reuse: Reuse) -> np.ndarray:
        """Tokens that may become masks again: those that a later step of the block can fill again."""
        standing = reuse.candidates(standing, at)
        standing = np.setdiff1d(standing, reuse.due(standing, at))
        return standing[held(plan.live, at.rows_reading(standing))]

    def _drafts(self, state: Denoising, reader: Reader, canvases: int) -> list[Reader]:
        """The first masks filled with what was proposed for them, one more in each draft, as long as one is left."""
        canvas, at, stream, request = state.canvas, state.canvas.progress, reader.stream, reader.request
        first, last = at.block[0] // self.shape.block_size, (at.block[1] - 1) // self.shape.block_size + 1
        own = state.blocks[0].drafts
        each = self.shape.draft_blocks(state.options, canvas.prompt_len, len(canvas))
        assert stream.kv_table is not None
        guesses, copies = state.guesses[: min(canvases, len(request.positions)) - 1], None
        if guesses and state.drafted != canvas.block:
            state.drafted = canvas.block
            many = len(own) // each
            to = np.concatenate([own[draft * each :][: last - first] for draft in range(many)])
            copies = np.stack([np.tile(stream.kv_table[first:last], many), to])
        tokens, made = at.tokens, []
        for draft, (position, token) in enumerate(guesses):
            tokens = tokens.copy()
            tokens[position] = token
            positions = request.positions[tokens[request.positions] == canvas.mask_id]
            heads = at.rows_reading(positions)
            table = stream.kv_table.copy()
            table[first:last] = own[draft * each :][: last - first]
            guess = replace(
                stream, token_ids=tokens, kv_table=table, head_positions=np.unique(heads) if at.shift else heads
            )  # fmt: skip
            request.drafts.append(HeadRequest(state, positions))
            made.append(Reader(guess, request.drafts[-1], own=False, copies=None if draft else copies))
        return made

    def _grow(self, state: Denoising, table: np.ndarray) -> None:
        """The canvas has more rows than before, and the request more blocks (`table`): those that came are dealt to its
        streams, and to what they are for, in turn."""
        options, canvas = state.options, state.canvas
        sizes = self.shape.blocks(options, canvas.prompt_len, len(canvas), canvas.rows)
        start = sum(len(part) for own in state.blocks.values() for part in own)
        for twin in range(canvas.streams):
            parts = []
            for part, size in zip(state.blocks.get(twin, Blocks.none()), sizes, strict=True):
                # without caches there are none, whatever vLLM gave to the request
                first, start = start, start + (size - len(part)) * options.caches
                parts.append(np.concatenate([part, table[first:start]]))
            own = state.blocks[twin] = Blocks(*parts)
            if (view := state.views.get(twin)) is None:
                state.views[twin] = self._view(state, own.kv, own.summaries)
            else:
                view.length, view.kv_table = canvas.rows, own.kv
        state.rows = canvas.rows

    def _view(self, state: Denoising, kv_table: np.ndarray, summary_table: np.ndarray) -> View | None:
        selection, canvas = state.options.selection, state.canvas
        if state.options.attention != "full" or not selection.applies(canvas.prompt_len, len(canvas)):
            return None
        frozen, size = state.options.reuse.keeps_contexts, self.shape.block_size
        pool = self._pool(selection)
        return View(selection, canvas.prompt_len, canvas.rows, size, kv_table, summary_table, frozen, pool)

    def _pool(self, selection: Selection) -> ChoicePool:
        """Views keep a pool that was evicted; those of another pool never share a group with them."""
        pool = self.choices.get(selection)
        return self.choices.put(selection, ChoicePool()) if pool is None else pool

    def _view_of_final(self, state: Denoising, twin: int) -> View | None:
        """What the current block sees of finished blocks, which never change. Its first step sees all of them: after a
        preemption, or with a prompt that is read in several steps, that step writes some."""
        selection, at = state.options.selection, state.canvas.progress
        if not selection.sparse or not at.block_step or not selection.applies(at.written, at.length):
            return None
        view, own = state.views[twin], state.blocks[twin]
        if view is None or view.prompt_len != at.written:
            view = state.views[twin] = View(
                selection, at.written, at.length, self.shape.block_size, own.kv, own.summaries, False,
                self._pool(selection), described=False,
            )  # fmt: skip
        return view


def held(live: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """[n] bool: which of the positions are among the live ones; both ascend."""
    if not len(live):
        return np.zeros(len(positions), np.bool_)
    if len(live) == live[-1] - live[0] + 1:
        return (positions >= live[0]) & (positions <= live[-1])
    return live[np.searchsorted(live, positions).clip(max=len(live) - 1)] == positions
