"""One denoising step of every scheduled request, in one packed forward; the same Python on every device."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

from vllm_dlm.cache.blocks import KVBlocks
from vllm_dlm.cache.budget import BlockShape
from vllm_dlm.engine.canvas import NOTHING
from vllm_dlm.engine.captured import CapturedSteps, Filled
from vllm_dlm.engine.counts import Counts
from vllm_dlm.engine.failures import Failures
from vllm_dlm.engine.forward import Watch, denoise
from vllm_dlm.engine.group import Packed
from vllm_dlm.engine.head import Alike, Head, HeadRequest
from vllm_dlm.engine.packing import Stream, among, pack, split
from vllm_dlm.engine.request import Blocks, Denoising
from vllm_dlm.engine.selected_keys import ChoicePool, View
from vllm_dlm.engine.shadow import shadow
from vllm_dlm.engine.upload import Upload
from vllm_dlm.plugins.reuse.base import Progress, Reuse, StepPlan, span
from vllm_dlm.plugins.selection.base import Selection

NO_DRAFTS: Mapping[str, int] = MappingProxyType({})


class Observer:
    """Looks at steps as they are made; tests and benchmarks derive from it, and view/steps.py."""

    def step_begins(self, states: Sequence[Denoising]) -> None: ...

    def step_packed(self, prepared: "Prepared") -> None:
        """What the forwards of the step are about to get; of what is launched, `Packed.layers` may be set."""

    def head_read(self, hidden: torch.Tensor, requests: Sequence[HeadRequest]) -> None:
        """hidden [R, E]: rows behind the last layer; the requests say which are theirs."""

    def step_ended(self, requests: Sequence[HeadRequest], counts: Counts) -> None: ...


class Reader(NamedTuple):
    """A stream, and whose logits it gives."""

    stream: Stream
    request: HeadRequest
    guides: bool = False  # it is the request's guidance twin
    own: bool = True  # it is the request's canvas, not a draft or a shadow of it
    #: [2, n] blocks, and which ones get what they hold before anything is computed
    copies: np.ndarray | None = None


class Prepared(NamedTuple):
    """What a step has on the device, once it is sent."""

    packed: list[Packed]  # a forward each
    launched: list[Reader]  # of whose canvases, in their order
    filled: Filled | None  # and a captured step
    replayed: list[Reader]  # of whose canvases that is
    replayed_heads: int  # rows that the head needs of that
    alike: list[Alike]
    uploads: list[Upload]
    copied: torch.Tensor | None  # [2, n], see Reader


class Denoiser:
    def __init__(
        self, model: torch.nn.Module, head: Head, shape: BlockShape, max_rows: int, device: torch.device,
        forwards: Callable[[], AbstractContextManager] = nullcontext,  # what is entered around them
    ):  # fmt: skip
        self.forwards = forwards
        self.model, self.head, self.shape, self.max_rows, self.device = model, head, shape, max_rows, device
        self.blocks = KVBlocks([])  # until vLLM says how many there are
        self.upload = Upload(device)
        self.captured: CapturedSteps | None = None
        self.masks: bool | None = None  # see Group; None: what is best on the device
        self.choices: dict[Selection, ChoicePool] = {}
        self.observers: list[Observer] = []

    def step(
        self, states: list[Denoising], tables: dict[str, np.ndarray], counts: Counts, failed: Failures,
        canvases: Mapping[str, int] = NO_DRAFTS,
    ) -> list[HeadRequest]:  # fmt: skip
        """One forward of all requests -> what is proposed for those that have not failed. `tables`: their blocks;
        `canvases`: how many those of a request may be, if more than one"""
        for observer in self.observers:
            observer.step_begins(states)
        readers: list[Reader] = []
        for state in states:
            with failed.of(state.req_id):
                readers += self.readers(state, tables[state.req_id], canvases.get(state.req_id, 1))
        requests = [reader.request for reader in readers if reader.own and not reader.guides]
        if readers:
            with failed.of(*(request.state.req_id for request in requests), in_forward=True), self.forwards():
                self._propose(readers, requests, counts, failed)
        requests = [request for request in requests if request.state.req_id not in failed]
        for observer in self.observers:
            observer.step_ended(requests, counts)
        return requests

    def _propose(self, readers: list[Reader], requests: list[HeadRequest], counts: Counts, failed: Failures) -> None:
        prepared = self._prepared(readers)
        for observer in self.observers:
            observer.step_packed(prepared)
        for upload in prepared.uploads:
            upload.send()
        if prepared.copied is not None:
            self.blocks.copy(*prepared.copied.unbind(0))
        hidden = self._hidden(prepared, counts)
        for observer in self.observers:
            observer.head_read(hidden, requests)
        self.head.read(hidden, prepared.alike)
        for request in requests:
            for one in request.all:
                if not one.finite:
                    own = [reader.stream for reader in readers if reader.request is one]
                    failed[request.state.req_id] = self._not_finite(own, one, hidden)
                    break

    def _prepared(self, readers: list[Reader]) -> Prepared:
        """Packs the canvases, and says to each request which hidden states are its own."""
        # Canvases treated alike stand together, so that they share a group of rows.
        kinds: dict[tuple, list[Reader]] = {}
        # Shadows come behind all canvases: where a step is split, theirs have been computed by then.
        # Rows that see no farther than to the end of their first block are seen by others.
        for reader in sorted(readers, key=lambda reader: (reader.stream.hole is not None, not reader.stream.whole)):
            kinds.setdefault(reader.stream.kind, []).append(reader)
        filled, replayed = None, list[Reader]()
        if self.captured is not None:
            # The others of a step are canvases to be refreshed, as a rule, which keep the device busy.
            for kind, alike in kinds.items():
                if filled := self.captured.fill([reader.stream for reader in alike]):
                    replayed = kinds.pop(kind)
                    break
        launched = [reader for alike in kinds.values() for reader in alike]
        packed = self._packed([reader.stream for reader in launched]) if launched else []
        start = 0
        for reader in launched:
            self._assign(reader, np.arange(start, start := start + len(reader.stream.head_positions)))
        # of a captured step all live rows come back
        for reader in replayed:
            self._assign(reader, start + among(reader.stream.plan.live, reader.stream.head_positions))
            start += reader.stream.num_rows
        uploads = [self.upload] if launched else []
        uploads += [filled.upload] if filled else []
        requests = [reader.request for reader in readers if not reader.guides]
        heads = sum(len(reader.stream.head_positions) for reader in replayed)
        copies = [reader.copies for reader in readers if reader.copies is not None]
        copied = uploads[0](np.concatenate(copies, axis=1)) if copies else None
        return Prepared(
            packed, launched, filled, replayed, heads, self.head.prepare(requests, uploads[0]), uploads, copied
        )

    @staticmethod
    def _assign(reader: Reader, rows: np.ndarray) -> None:
        """`rows` [R]: the hidden states of the stream's head positions"""
        stream, request = reader.stream, reader.request
        # several positions may be read at one row
        read = request.state.canvas.progress.rows_reading(request.positions)
        rows = rows[np.searchsorted(stream.head_positions, read)]
        request.guide_rows, request.rows = (rows, request.rows) if reader.guides else (request.guide_rows, rows)

    def _hidden(self, prepared: Prepared, counts: Counts) -> torch.Tensor:
        def replayed() -> list[torch.Tensor]:
            return [] if prepared.filled is None else [prepared.filled.run(counts)]

        def launched() -> list[torch.Tensor]:
            return [denoise(self.model, part, self.blocks, counts) for part in prepared.packed]

        counts.head_rows += prepared.replayed_heads
        # What is launched are shadows, which read what their canvases have in their blocks, or refreshes, and a first
        # block, which is read by those behind it.
        if any(group.hole is not None for part in prepared.packed for group in part.groups):
            last = replayed()
            hidden = launched() + last
        else:
            hidden = launched() + replayed()
        return torch.cat(hidden) if len(hidden) > 1 else hidden[0]

    def _not_finite(self, streams: list[Stream], request: HeadRequest, hidden: torch.Tensor) -> str:
        """Where the numbers of a request stopped being finite: its step once more, watched. (It ends now, so it
        does not matter what that writes to its caches.)"""
        rows = np.concatenate([request.rows, request.guide_rows if len(streams) > 1 else request.rows[:0]])
        places = []
        if not hidden[torch.from_numpy(rows).to(hidden.device)].isfinite().all():
            self.forward(streams, Counts(), lambda place, x: places.append(place) if not x.isfinite().all() else None)
            places.append("a layer")
        return (
            f"NaN or infinite logits; the first numbers that are not finite come from {[*places, 'the output head'][0]}"
        )

    def readers(self, state: Denoising, table: np.ndarray, canvases: int = 1) -> list[Reader]:
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
        if options.decoding.judges(state.memory) and len(standing := self._readable(canvas.standing, at, plan, reuse)):
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
        """What may become a mask again: those that can be filled again, before the next refresh. Of a model that reads
        a position at the row before, the block's first one is read at a row that is not its own."""
        standing = reuse.candidates(standing, at)
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
        pool = self.choices.setdefault(selection, ChoicePool())
        return View(selection, canvas.prompt_len, canvas.rows, size, kv_table, summary_table, frozen, pool)

    def _view_of_final(self, state: Denoising, twin: int) -> View | None:
        """What the current block sees of those before it, where these never change. Its first step sees all: there some
        are written that others have had for long, of whoever was preempted or has a prompt in several steps."""
        selection, at = state.options.selection, state.canvas.progress
        if not selection.sparse or not at.block_step or not selection.applies(at.written, at.length):
            return None
        view, own = state.views[twin], state.blocks[twin]
        if view is None or view.prompt_len != at.written:
            pool = self.choices.setdefault(selection, ChoicePool())
            view = state.views[twin] = View(
                selection, at.written, at.length, self.shape.block_size, own.kv, own.summaries, False, pool,
                described=False,
            )  # fmt: skip
        return view

    def forward(self, streams: list[Stream], counts: Counts, watch: Watch | None = None) -> torch.Tensor:
        """-> [R, E] of the rows that the streams' head positions need, stream after stream"""
        packed = self._packed(streams)
        self.upload.send()
        with self.forwards():
            hidden = [denoise(self.model, part, self.blocks, counts, watch) for part in packed]
        return torch.cat(hidden) if len(hidden) > 1 else hidden[0]

    def _packed(self, streams: list[Stream]) -> list[Packed]:
        return [pack(part, self.upload, self.shape, self.masks) for part in split(streams, self.max_rows)]


def plain_stream(tokens: np.ndarray, heads: np.ndarray) -> Stream:
    """A canvas as the exact model sees it, without caches."""
    plan = StepPlan.dense(span(0, len(tokens)))
    return Stream(Reuse(), plan, tokens, heads, NOTHING, (0, len(tokens)))


def held(live: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """[n] bool: which of the positions are among the live ones; both ascend."""
    if not len(live):
        return np.zeros(len(positions), np.bool_)
    if len(live) == live[-1] - live[0] + 1:
        return (positions >= live[0]) & (positions <= live[-1])
    return live[np.searchsorted(live, positions).clip(max=len(live) - 1)] == positions
