"""One denoising step of every scheduled request, in one packed forward; the same Python on every device."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
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
from vllm_dlm.engine.readers import Reader, Readers
from vllm_dlm.engine.request import Denoising
from vllm_dlm.engine.upload import Upload
from vllm_dlm.plugins.reuse.base import Reuse, StepPlan, span

NO_DRAFTS: Mapping[str, int] = MappingProxyType({})


class Observer:
    """Looks at steps as they are made; tests and benchmarks derive from it, and view/steps.py."""

    def step_begins(self, states: Sequence[Denoising]) -> None: ...

    def step_packed(self, prepared: "Prepared") -> None:
        """What the forwards of the step are about to get; `Packed.observer` may be set where layers are launched."""

    def head_read(self, hidden: torch.Tensor, requests: Sequence[HeadRequest]) -> None:
        """hidden [R, E]: rows behind the last layer; the requests say which are theirs."""

    def step_ended(self, requests: Sequence[HeadRequest], counts: Counts) -> None: ...


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
        self.readers = Readers(shape)
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
                readers += self.readers.of(state, tables[state.req_id], canvases.get(state.req_id, 1))
        requests = [reader.request for reader in readers if reader.own and not reader.guides]
        if readers:
            with failed.of(*(request.state.req_id for request in requests), in_forward=True), self.forwards():
                if (prepared := self._prepare_packable(readers, failed)) is not None:
                    readers = [reader for reader in readers if reader.name not in failed]
                    requests = [request for request in requests if request.state.req_id not in failed]
                    self._propose(prepared, readers, requests, counts, failed)
        requests = [request for request in requests if request.state.req_id not in failed]
        for observer in self.observers:
            observer.step_ended(requests, counts)
        return requests

    def _prepare_packable(self, readers: list[Reader], failed: Failures) -> Prepared | None:
        """Packs the step, without the requests that cannot be packed, which fail. None: no request is left."""
        while readers:
            together, alone = Failures(failed.ranks), Failures(failed.ranks)
            names = list(dict.fromkeys(reader.name for reader in readers))
            with together.of(*names):
                return self._prepared(readers)
            for name in names:
                self.upload.begin()  # without what the last attempt has left
                with alone.of(name):
                    self._prepared([reader for reader in readers if reader.name == name])
            self.upload.begin()
            failed.update(alone or together)
            readers = [reader for reader in readers if reader.name not in failed]
        return None

    def _propose(
        self, prepared: Prepared, readers: list[Reader], requests: list[HeadRequest], counts: Counts, failed: Failures
    ) -> None:
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
                    self._clear(request.state)
                    break

    def _prepared(self, readers: list[Reader]) -> Prepared:
        """Packs the canvases, and assigns hidden states to requests."""
        # Canvases of one kind are adjacent: they share a group of rows.
        kinds: dict[tuple, list[Reader]] = {}
        # Shadows come after all canvases: if the step is split, their canvases have been computed by then.
        # Whole canvases come first: one may be the first block of a request, which its later blocks read.
        for reader in sorted(readers, key=lambda reader: (reader.stream.hole is not None, not reader.stream.whole)):
            kinds.setdefault(reader.stream.kind, []).append(reader)
        filled, replayed = None, list[Reader]()
        if self.captured is not None:
            # Partial steps come first: others are refreshes as a rule, which keep the device busy for longer.
            for kind, alike in sorted(kinds.items(), key=lambda item: item[1][0].stream.whole):
                if filled := self.captured.fill([reader.stream for reader in alike]):
                    replayed = kinds.pop(kind)
                    break
        launched = [reader for alike in kinds.values() for reader in alike]
        packed = self._packed([reader.stream for reader in launched]) if launched else []
        start = 0
        for reader in launched:
            self._assign(reader, np.arange(start, start := start + len(reader.stream.head_positions)))
        # a captured step returns all live rows
        for reader in replayed:
            self._assign(reader, start + among(reader.stream.plan.live, reader.stream.head_positions))
            start += reader.stream.num_rows
        # The head's arrays may be larger than the staging memory of a captured step, which cannot grow.
        uploads = [self.upload, filled.upload] if filled else [self.upload]
        requests = [reader.request for reader in readers if not reader.guides]
        heads = sum(len(reader.stream.head_positions) for reader in replayed)
        copies = [reader.copies for reader in readers if reader.copies is not None]
        copied = self.upload(np.concatenate(copies, axis=1)) if copies else None
        return Prepared(
            packed, launched, filled, replayed, heads, self.head.prepare(requests, self.upload), uploads, copied
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
        # Shadows read what their canvases have in their blocks, and whole canvases, among them a first block, are read
        # by those behind it.
        shadows = any(group.hole is not None for part in prepared.packed for group in part.groups)
        if shadows or any(reader.stream.whole for reader in prepared.replayed):
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

    def _clear(self, state: Denoising) -> None:
        """Zeros the blocks of a request that failed: FlashAttention multiplies values after a sequence's end by 0, so
        that a NaN there would reach the next owner of the block. Blocks of a shared prefix stay: others read them."""
        if state.options.attention == "full" and state.blocks:
            blocks = np.concatenate([part for own in state.blocks.values() for part in own])
            self.blocks.clear(torch.from_numpy(blocks).to(self.device))

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
