"""What a worker sees of the steps of observed requests, beyond what it commits: an observer of the denoiser.

It is attached while there are such requests. In a forward that has a canvas of one, its layers are driven by
`SeenLayers`, which notes on the device which rows went through the feed-forward and which keys a selection showed; the
notes come back with what the head reads. A step that is replayed runs as it was captured: of it the host tells the
rows it knows, and of a policy with a budget the mean share of the others.

A fault ends the view of the observed requests of its step. The step itself goes on (see isolation.py).
"""

from collections.abc import Sequence
from functools import partial
from itertools import islice
from time import perf_counter
from typing import Any

import numpy as np
import torch

from vllm_dlm.canvas.denoising import Denoising
from vllm_dlm.canvas.stream import Reading, Stream
from vllm_dlm.plugins.reuse.flow import Attend, AttendMoved, FeedForward, Rows
from vllm_dlm.step.batch import Group
from vllm_dlm.step.captured import PaddedStep
from vllm_dlm.step.counts import Counts
from vllm_dlm.step.denoiser import Denoiser, Observer, PreparedStep
from vllm_dlm.step.head import most_probable
from vllm_dlm.step.layer import LayerStep
from vllm_dlm.view.isolation import Isolated, isolated
from vllm_dlm.view.seen import ByCanvas, SeenGroup, SeenStep, add

#: of a guess so many tokens are told, the one that is proposed among them or not
BEST = 4


class SeenLayers(LayerStep):
    """Layers that report to `seeing` what they do to the groups of observed canvases."""

    def __init__(self, seeing: "Seeing", seen: dict[int, SeenGroup], *args):
        super().__init__(*args)
        self.seeing, self.seen = seeing, seen  # by the group's number
        self.queried: dict[int, Rows] = {}

    def _answers(self, kind: type, asks: dict[int, Any]) -> Sequence:
        self.seeing.asked(self, asks)
        return super()._answers(kind, asks)

    def _attended(self, group: Group, ask) -> torch.Tensor:
        own = self.seeing.counts_of(self, group)
        if own is None:
            return super()._attended(group, ask)
        counts, self.counts = self.counts, own
        try:
            context = super()._attended(group, ask)
            own.add_to(counts)
        finally:
            self.counts = counts
        self.seeing.attended(self, group, own)
        return context

    def group_of(self, group: Group) -> SeenGroup | None:
        numbers = (number for number, part in enumerate(self.parts) if part.group is group)
        return self.seen.get(next(numbers))

    def rows_of(self, number: int, ask: FeedForward) -> Rows:
        """Rows that pass the feed-forward: those that are picked, else the ones that were attended to, or all"""
        rows = self.queried.get(number)
        if ask.picked is not None:
            return ask.picked.rows
        return self.parts[number].all if rows is None or len(rows) != len(ask.x) else rows


class Seeing(Observer, Isolated):
    def __init__(self, denoiser: Denoiser):
        self.denoiser, self.attached = denoiser, False
        self.layers = len(denoiser.model.model.layers)
        self.observed: set[str] = set()  # of the runner
        self.current: list[str] = []  # requests of this step
        self.steps: dict[str, SeenStep] = {}
        self.groups: list[SeenGroup] = []
        self.replayed: tuple[PaddedStep, list[Stream]] | None = None

    @property
    def subject(self) -> str:
        return f"requests {', '.join(self.steps)}"

    def attach(self, observed: set[str], current: list[str]) -> None:
        """Called before a step. `observed`: requests with onlookers; `current`: requests of this step"""
        self.observed, self.current = observed, current
        self._attach()

    @isolated
    def _attach(self) -> None:
        wanted = bool(self.observed)
        if wanted != self.attached:
            self.attached = wanted
            (self.denoiser.observers.append if wanted else self.denoiser.observers.remove)(self)

    def take(self) -> dict[str, SeenStep]:
        """Called after a step -> what was seen of each observed request"""
        taken, self.steps, self.fault = self.steps, {}, None
        self.groups, self.replayed, self.denoiser.head.best = [], None, None
        return taken

    def fail(self, error: Exception) -> None:
        """Ends the view of the observed requests of this step. `take` restores what a step expects."""
        self.steps = {name: SeenStep() for name in self.current if name in self.observed}
        super().fail(error)
        for seen in self.steps.values():
            seen.fault = self.fault
        self.observed -= self.steps.keys()

    # -- a step ----------------------------------------------------------------------------

    @isolated
    def step_begins(self, states: Sequence[Denoising]) -> None:
        self.steps = {
            state.req_id: SeenStep(rows=np.zeros(state.canvas.rows))
            for state in states
            if state.req_id in self.observed
        }
        self.begin = perf_counter()
        self.denoiser.head.best = self.best if self.steps else None

    @isolated
    def step_packed(self, prepared: PreparedStep) -> None:
        streams = iter(prepared.launched)
        for batch in prepared.batches:
            seen = {}
            for number, group in enumerate(batch.groups):
                own = list(islice(streams, len(group.kv_lens)))
                if any(stream.request in self.steps for stream in own):
                    seen[number] = SeenGroup(group, own)
            if seen:
                batch.layers = partial(SeenLayers, self, seen)
                self.groups += seen.values()
        if prepared.padded is not None:
            self.replayed = prepared.padded, prepared.replayed

    # -- in a layer ------------------------------------------------------------------------

    @isolated
    def asked(self, layers: SeenLayers, asks: dict[int, Any]) -> None:
        for number, ask in asks.items():
            if number in layers.seen and isinstance(ask, (Attend, AttendMoved)):
                layers.queried[number] = ask.rows
            elif number in layers.seen and isinstance(ask, FeedForward):
                layers.seen[number].fed(layers.rows_of(number, ask))

    @isolated
    def counts_of(self, layers: SeenLayers, group: Group) -> ByCanvas | None:
        return None if layers.group_of(group) is None else ByCanvas(self, len(group.kv_lens))

    @isolated
    def count_keys(self, counts: ByCanvas, q_lens: list[int], kv_lens: list[int], dense: list[int]) -> None:
        for canvas, (queries, keys, there) in enumerate(zip(q_lens, kv_lens, dense, strict=True)):
            if queries:
                counts.read[canvas] += keys
                counts.there[canvas] += there

    @isolated
    def attended(self, layers: SeenLayers, group: Group, counts: ByCanvas) -> None:
        if (seen := layers.group_of(group)) is not None:
            seen.attended(layers.index, counts)

    # -- after the layers ------------------------------------------------------------------

    @isolated
    def head_read(self, hidden: torch.Tensor, readings: Sequence[Reading]) -> None:
        for group in self.groups:
            group.bring()

    def best(self, logits_RV: torch.Tensor) -> torch.Tensor:
        """-> [2 * BEST, R] see `most_probable`; after a fault zeros, since the head joins several of them"""
        found = self._most_probable(logits_RV)
        return logits_RV.new_zeros(2 * BEST, len(logits_RV), dtype=torch.float64) if found is None else found

    @isolated
    def _most_probable(self, logits_RV: torch.Tensor) -> torch.Tensor:
        return most_probable(logits_RV, BEST)

    @isolated
    def step_ended(self, readings: Sequence[Reading], counts: Counts) -> None:
        self.denoiser.head.best = None
        if self.denoiser.device.type == "cuda" and self.groups:
            torch.cuda.current_stream().synchronize()  # over, unless the head had nothing to read
        for group in self.groups:
            group.tell(self.steps, self.layers)
        if self.replayed is not None:
            self._tell_replayed(*self.replayed)
        self.groups, self.replayed = [], None
        for reading in readings:
            if (seen := self.steps.get(reading.state.req_id)) is not None:
                seen.tokens = reading.proposal.token
                seen.best = None if reading.best is None else reading.best.reshape(2, BEST, -1)
                seen.ms = 1000 * (perf_counter() - self.begin)

    def _tell_replayed(self, padded: PaddedStep, streams: list[Stream]) -> None:
        (group,) = padded.batch.groups
        counts, recorded = ByCanvas(self, padded.streams), padded.step.counts
        recorded.repeat(padded.batch, padded.streams, counts)
        fed = [event.rows for event in recorded.events if event.phase == "feed_forward"]
        everywhere = fed.count("all")
        others = len(fed) - everywhere
        for canvas, stream in enumerate(streams):
            if (seen := self.steps.get(stream.request)) is None:
                continue
            leading, forced = group.leading_counts[canvas], stream.forced
            left = stream.num_rows - len(forced)
            shares = np.full(stream.num_rows, (leading - len(forced)) / left if left else 0.0)
            shares[forced] = 1.0
            through = everywhere * stream.num_rows + others * leading
            counted = through, counts.read[canvas], counts.there[canvas]
            add(seen, stream, self.layers, counted, (everywhere + others * shares) / self.layers)
