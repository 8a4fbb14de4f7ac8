"""One denoising step of all scheduled requests in one packed forward; the same code on every device."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from vllm_dlm.cache.blocks import KVBlocks
from vllm_dlm.cache.budget import BlockShape
from vllm_dlm.canvas.caches import StreamCaches
from vllm_dlm.canvas.denoising import Denoising
from vllm_dlm.canvas.stream import Reading, Stream, among, plain_stream
from vllm_dlm.plugins.reuse.flow import LayerResult
from vllm_dlm.step.batch import Batch
from vllm_dlm.step.captured import CapturedSteps, PaddedStep
from vllm_dlm.step.counts import Counts
from vllm_dlm.step.failures import Failures
from vllm_dlm.step.head import Head, HeadBatch
from vllm_dlm.step.layer import LayerStep, concatenated
from vllm_dlm.step.packing import pack, split
from vllm_dlm.step.upload import Upload

if TYPE_CHECKING:
    from vllm_dlm.models.transformer import Normed

__all__ = ["NO_SPECULATION", "Denoiser", "Observer", "PreparedStep", "denoise", "denoise_live", "plain_stream"]

NO_SPECULATION: Mapping[str, int] = MappingProxyType({})

#: called with the name of each part of the model and its output rows
Watch = Callable[[str, torch.Tensor], None]


class Observer:
    """Base class for observers of steps, in view/steps.py, tests and benchmarks."""

    def step_begins(self, states: Sequence[Denoising]) -> None: ...

    def step_packed(self, prepared: "PreparedStep") -> None:
        """Called before the forwards. Launched batches may get a `Batch.observer`."""

    def head_read(self, hidden: torch.Tensor, readings: Sequence[Reading]) -> None:
        """hidden [R, E]: rows after the last layer. Readings have the indices of their rows."""

    def step_ended(self, readings: Sequence[Reading], counts: Counts) -> None: ...


class PreparedStep(NamedTuple):
    """Data of a step on the device, valid once its uploads are sent."""

    batches: list[Batch]  # one per forward that is launched
    launched: list[Stream]  # streams of these batches, in the order of rows
    padded: PaddedStep | None  # a captured step that is replayed
    replayed: list[Stream]  # streams of the captured step
    replayed_heads: int  # number of their rows that the head needs
    head: list[HeadBatch]
    uploads: list[Upload]
    copied: torch.Tensor | None  # [2, n], see Stream.copies


class Denoiser:
    def __init__(
        self,
        model: torch.nn.Module,
        head: Head,
        shape: BlockShape,
        max_rows: int,
        device: torch.device,
        forwards: Callable[[], AbstractContextManager] = nullcontext,  # entered around forwards
    ):
        self.forwards = forwards
        self.model, self.head, self.shape, self.max_rows, self.device = model, head, shape, max_rows, device
        self.blocks = KVBlocks([])  # replaced once vLLM has allocated the KV cache
        self.upload = Upload(device)
        self.captured: CapturedSteps | None = None
        self.masks: bool | None = None  # see Group; None: chosen for the device
        self.caches = StreamCaches(shape)
        self.observers: list[Observer] = []

    def step(
        self,
        states: list[Denoising],
        tables: dict[str, np.ndarray],
        counts: Counts,
        failed: Failures,
        canvases: Mapping[str, int] = NO_SPECULATION,
    ) -> list[Reading]:
        """One forward of all requests -> the reading of the canvas of each request that has not failed. `tables`: KV
        blocks of each request; `canvases`: maximum number of streams of requests that may speculate in this step"""
        for observer in self.observers:
            observer.step_begins(states)
        streams: list[Stream] = []
        readings: list[Reading] = []
        for state in states:
            with failed.catch(state.req_id):
                made = state.streams(self.caches, tables[state.req_id], canvases.get(state.req_id, 1))
                streams += made
                readings.append(next(stream.reading for stream in made if stream.reading is not None))
        if streams:
            names = [reading.state.req_id for reading in readings]
            with failed.catch(*names, in_forward=True), self.forwards():
                if (prepared := self._prepare_packable(streams, failed)) is not None:
                    readings = [reading for reading in readings if reading.state.req_id not in failed]
                    self._propose(prepared, readings, counts, failed)
        readings = [reading for reading in readings if reading.state.req_id not in failed]
        for observer in self.observers:
            observer.step_ended(readings, counts)
        return readings

    def _prepare_packable(self, streams: list[Stream], failed: Failures) -> PreparedStep | None:
        """Packs the step. Requests that cannot be packed fail and are left out. None: no request is left."""
        while streams:
            together, alone = Failures(failed.ranks), Failures(failed.ranks)
            names = list(dict.fromkeys(stream.request for stream in streams))
            with together.catch(*names):
                return self._prepared(streams)
            for name in names:
                self.upload.begin()  # drops arrays of the last attempt
                with alone.catch(name):
                    self._prepared([stream for stream in streams if stream.request == name])
            self.upload.begin()
            failed.update(alone or together)
            streams = [stream for stream in streams if stream.request not in failed]
        return None

    def _propose(self, prepared: PreparedStep, readings: list[Reading], counts: Counts, failed: Failures) -> None:
        for observer in self.observers:
            observer.step_packed(prepared)
        for upload in prepared.uploads:
            upload.send()
        if prepared.copied is not None:
            self.blocks.copy(*prepared.copied.unbind(0))
        hidden = self._hidden(prepared, counts)
        for observer in self.observers:
            observer.head_read(hidden, readings)
        self.head.read(hidden, prepared.head)
        for own in readings:
            for reading in own.all:
                if not reading.finite:
                    streams = [stream for stream in prepared.launched + prepared.replayed if stream.reading is reading]
                    failed[own.state.req_id] = self._not_finite(streams, reading, hidden)
                    self._clear(own.state)
                    break

    def _prepared(self, streams: list[Stream]) -> PreparedStep:
        """Packs the streams, and assigns hidden states to their readings."""
        # Streams of one kind are adjacent: they share a group of rows.
        kinds: dict[tuple, list[Stream]] = {}
        # Shadows come after all canvases, so that their canvases are computed first even if the step is split.
        # Whole canvases come first: one may be the first block of a request, and its later blocks read it.
        for stream in sorted(streams, key=lambda stream: (stream.hidden_row is not None, not stream.whole)):
            kinds.setdefault(stream.kind, []).append(stream)
        padded, replayed = None, list[Stream]()
        if self.captured is not None:
            # Try partial steps first. Other steps are mostly refreshes, which benefit less from a replay.
            for kind, alike in sorted(kinds.items(), key=lambda item: item[1][0].whole):
                if padded := self.captured.pad(alike):
                    replayed = kinds.pop(kind)
                    break
        launched = [stream for alike in kinds.values() for stream in alike]
        batches = self._batches(launched) if launched else []
        start = 0
        for stream in launched:
            self._assign(stream, np.arange(start, start := start + len(stream.head_positions)))
        # a captured step returns all live rows
        for stream in replayed:
            self._assign(stream, start + among(stream.plan.live, stream.head_positions))
            start += stream.num_rows
        # The head's arrays may be larger than the staging memory of a captured step, which cannot grow.
        uploads = [self.upload, padded.upload] if padded else [self.upload]
        read = [stream.reading for stream in streams if stream.reading is not None and not stream.guides]
        copies = [stream.copies for stream in streams if stream.copies is not None]
        copied = self.upload(np.concatenate(copies, axis=1)) if copies else None
        heads = sum(len(stream.head_positions) for stream in replayed)
        return PreparedStep(
            batches, launched, padded, replayed, heads, self.head.prepare(read, self.upload), uploads, copied
        )

    @staticmethod
    def _assign(stream: Stream, rows: np.ndarray) -> None:
        """`rows` [R]: the hidden states of the stream's head positions"""
        if (reading := stream.reading) is None:
            return
        if stream.drafted is not None:
            reading.rows = rows[np.argsort(stream.drafted)]
            return
        # several positions may be read at one row
        read = reading.state.canvas.progress.rows_reading(reading.positions)
        rows = rows[np.searchsorted(stream.head_positions, read)]
        if stream.guides:
            reading.guide_rows = rows
        else:
            reading.rows = rows

    def _hidden(self, prepared: PreparedStep, counts: Counts) -> torch.Tensor:
        def replayed() -> list[torch.Tensor]:
            return [] if prepared.padded is None else [prepared.padded.replay(counts)]

        def launched() -> list[torch.Tensor]:
            return [denoise(self.model, batch, self.blocks, counts) for batch in prepared.batches]

        counts.head_rows += prepared.replayed_heads
        # Shadows read keys that their canvases write. Whole canvases may be first blocks, which later blocks read.
        shadows = any(group.hidden_row is not None for batch in prepared.batches for group in batch.groups)
        if shadows or any(stream.whole for stream in prepared.replayed):
            last = replayed()
            hidden = launched() + last
        else:
            hidden = launched() + replayed()
        return torch.cat(hidden) if len(hidden) > 1 else hidden[0]

    def _not_finite(self, streams: list[Stream], reading: Reading, hidden: torch.Tensor) -> str:
        """Repeats the step of a request to find the first part of the model with non-finite values. The request ends,
        so the repeated writes to its caches have no effect."""
        rows = np.concatenate([reading.rows, reading.guide_rows if len(streams) > 1 else reading.rows[:0]])
        places = []
        if not hidden[torch.from_numpy(rows).to(hidden.device)].isfinite().all():
            self.forward(streams, Counts(), lambda place, x: places.append(place) if not x.isfinite().all() else None)
            places.append("a layer")
        return f"NaN or infinite logits; the first non-finite values come from {[*places, 'the output head'][0]}"

    def _clear(self, state: Denoising) -> None:
        """Zeros the blocks of a failed request: FlashAttention multiplies values after a sequence's end by 0, so a NaN
        there would reach the next owner of the block. Blocks of a shared prefix are kept, because other requests read
        them."""
        if state.options.attention == "full" and state.blocks:
            blocks = np.concatenate([part for own in state.blocks.values() for part in own])
            self.blocks.clear(torch.from_numpy(blocks).to(self.device))

    def forward(self, streams: list[Stream], counts: Counts, watch: Watch | None = None) -> torch.Tensor:
        """-> [R, E] hidden states of the streams' head positions, stream after stream"""
        batches = self._batches(streams)
        self.upload.send()
        with self.forwards():
            hidden = [denoise(self.model, batch, self.blocks, counts, watch) for batch in batches]
        return torch.cat(hidden) if len(hidden) > 1 else hidden[0]

    def _batches(self, streams: list[Stream]) -> list[Batch]:
        return [pack(part, self.upload, self.shape, self.masks) for part in split(streams, self.max_rows)]


# -- the model over one batch --------------------------------------------------------------------


def denoise(model, batch: Batch, blocks: KVBlocks, counts: Counts, watch: Watch | None = None) -> torch.Tensor:
    """-> [R, E] hidden states before the final norm, for the rows that the head needs, stream after stream"""
    _, ends = through_layers(model, batch, blocks, counts, watch)
    # The last layer may return only some rows, so look up the head's rows among them.
    heads = []
    for (rows, x, ffn), group in zip(ends, batch.groups, strict=True):
        place = rows.places(group.head)
        heads.append(x[place] + ffn[place])
    counts.head_rows += sum(map(len, heads))
    return concatenated(heads)


def denoise_live(model, batch: Batch, blocks: KVBlocks, counts: Counts) -> torch.Tensor:
    """Like `denoise`, for every live row: [T, E]"""
    step, ends = through_layers(model, batch, blocks, counts)
    return step.joined([x for _, x, _ in ends]) + step.joined([ffn for _, _, ffn in ends])


def through_layers(
    model, batch: Batch, blocks: KVBlocks, counts: Counts, watch: Watch | None = None
) -> tuple[LayerStep, list[LayerResult]]:
    """-> the driver, and the result of each group's flow after the last layer"""
    layers = model.model.layers
    step = LayerStep(batch, model.model.rope.table, layers, blocks, counts)
    x_TE = model.embed_input_ids(batch.ids)
    if watch is not None:
        watch("the embedding", x_TE)
    normed: Normed = layers[0].input_layernorm(x_TE), x_TE
    for index in range(len(layers)):
        ends = step.run(index, normed)
        residual, added = step.joined([x for _, x, _ in ends]), step.joined([ffn for _, _, ffn in ends])
        if watch is not None:
            watch(f"layer {index}", residual + added)
        if index + 1 < len(layers):
            normed = layers[index + 1].add_and_norm_input(residual, added)
    return step, ends
