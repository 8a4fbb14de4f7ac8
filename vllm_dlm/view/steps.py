"""What a worker sees of the steps of observed requests, beyond what it commits: an observer of the denoiser.

It is attached while there are such requests. In a forward that has a canvas of one, its layers are driven by
`SeenLayers`, which notes on the device which rows went through the feed-forward and which keys a selection showed; the
notes come back with what the head reads. A step that is replayed runs as it was captured: of it the host tells the
rows it knows, and of a policy with a budget the mean share of the others.

A fault ends the view of the observed requests of its step. The step itself goes on (see isolation.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from time import perf_counter
from typing import Any

import numpy as np
import torch

from vllm_dlm.engine.captured import Filled
from vllm_dlm.engine.counts import Counts
from vllm_dlm.engine.denoiser import Denoiser, Observer, Prepared
from vllm_dlm.engine.group import Group
from vllm_dlm.engine.head import HeadRequest, most_probable
from vllm_dlm.engine.layer import LayerStep
from vllm_dlm.engine.readers import Reader
from vllm_dlm.engine.request import Denoising
from vllm_dlm.plugins.reuse.flow import Attend, AttendMoved, FeedForward, Rows
from vllm_dlm.view.isolation import Isolated, isolated

#: of a guess so many tokens are told, the one that is proposed among them or not
BEST = 4


@dataclass
class SeenStep:
    """Of one request. Rows are those of its canvas."""

    ms: float = 0.0
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [C] proposed where the commit read
    best: np.ndarray | None = None  # [2, BEST, C] the most probable tokens there, and how probable
    live: int = 0  # rows carried through layers, in all of them
    recomputed: int = 0  # rows through the feed-forward, in all layers
    keys_read: int = 0
    keys_there: int = 0
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0))  # [N] in which share of the layers recomputed
    pages: np.ndarray | None = None  # [units] in which share of layers and key heads shown
    unit: int = 1  # positions of one
    fault: str | None = None  # why nothing more is known of this request


class ByCanvas(Counts):
    """Of a group, and of each of its canvases."""

    def __init__(self, seeing: "Seeing", canvases: int):
        super().__init__()
        self.seeing = seeing
        self.read, self.there = np.zeros(canvases, np.int64), np.zeros(canvases, np.int64)

    def attended(self, q_lens: list[int], kv_lens: list[int], read: bool, dense: list[int] | None = None) -> None:
        super().attended(q_lens, kv_lens, read, dense)
        if read:
            self.seeing.count_keys(self, q_lens, kv_lens, dense or kv_lens)

    def add_to(self, counts: Counts) -> None:
        for name in ("pairs", "keys_read", "keys_dense", "keys_scored", "summaries"):
            setattr(counts, name, getattr(counts, name) + getattr(self, name))


class SeenGroup:
    """What its layers have done to the rows of a group; T rows, C canvases."""

    def __init__(self, group: Group, readers: Sequence[Reader]):
        canvases = len(group.kv_lens)
        self.group, self.readers = group, readers
        self.everywhere = 0  # layers that recomputed every row
        self.recomputed: torch.Tensor | None = None  # [T] the others that recomputed it, on the device
        self.through = np.zeros(canvases, np.int64)  # rows through the feed-forward
        self.read, self.there = np.zeros(canvases, np.int64), np.zeros(canvases, np.int64)
        self.shown: torch.Tensor | None = None  # [C, 1 + units] how often each was, on the device; the first is nobody
        self.unseen = 0  # layers that looked at everything
        self.noted = -1  # the layer whose choice is counted
        self.copies: list[torch.Tensor | None] = [None, None]

    def fed(self, rows: Rows) -> None:
        self.through += np.array(rows.counts)
        if rows.index is None and rows.mask is None:
            self.everywhere += 1
            return
        columns = self.group.columns.forced
        if self.recomputed is None:
            self.recomputed = torch.zeros(len(columns), dtype=torch.int32, device=columns.device)
        if rows.index is None:
            self.recomputed += rows.mask
        else:
            ones = torch.ones_like(rows.index) if rows.mask is None else rows.mask
            self.recomputed.index_add_(0, rows.index, ones.to(torch.int32))

    def attended(self, layer: int, counts: ByCanvas) -> None:
        self.read, self.there = self.read + counts.read, self.there + counts.there
        selecting = self.group.selecting
        if selecting is None or self.noted == layer:
            return
        if (shown := selecting.shown_in(layer)) is None:
            return
        self.noted = layer
        units = selecting.units(shown).long() + 1  # [C, Hkv, K]
        if self.shown is None:
            most = max(-(-view.length // view.selection.unit) for view in selecting.views)
            self.shown = torch.zeros(len(units), 1 + most, dtype=torch.int32, device=units.device)
            self.heads = units.shape[1]
        flat = units.flatten(1)
        self.shown.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.int32))
        self.unseen -= 1

    def bring(self) -> None:
        """The notes are on their way to the host; whoever waits for the head has them."""
        self.copies = [on_the_way(own) for own in (self.recomputed, self.shown)]

    def tell(self, steps: dict[str, SeenStep], layers: int) -> None:
        recomputed, shown = self.copies
        rows = np.zeros(len(self.group.columns.forced)) if recomputed is None else recomputed.numpy()
        start = 0
        for canvas, reader in enumerate(self.readers):
            stream = reader.stream
            span, start = slice(start, start + stream.num_rows), start + stream.num_rows
            if (seen := steps.get(reader.request.state.req_id)) is None:
                continue
            pages = None
            if shown is not None:
                view = self.group.selecting.views[canvas]  # type: ignore[union-attr]
                everything = (layers + self.unseen) * self.heads
                own = shown.numpy()[canvas, 1 : 1 - (-view.length // view.selection.unit)]
                pages = (own + everything) / (layers * self.heads), view.selection.unit
            counted = self.through[canvas], self.read[canvas], self.there[canvas]
            add(seen, reader, layers, counted, (rows[span] + self.everywhere) / layers, pages)


def add(seen: SeenStep, reader: Reader, layers: int, counted: Sequence, shares: np.ndarray, pages=None) -> None:
    """One stream more; `shares` [its live rows]"""
    stream = reader.stream
    through, read, there = map(int, counted)
    seen.live += stream.num_rows * layers
    seen.recomputed += through
    seen.keys_read += read
    seen.keys_there += there
    if reader.guides or stream.hole is not None:
        return
    live = stream.plan.live
    seen.rows[live] = np.maximum(seen.rows[live], shares)
    if pages is not None:
        seen.pages, seen.unit = pages


def on_the_way(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None or tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


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
        self.replayed: tuple[Filled, list[Reader]] | None = None

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
            state.req_id: SeenStep(rows=np.zeros(state.canvas.rows)) for state in states if state.req_id in self.observed
        }
        self.begin = perf_counter()
        self.denoiser.head.best = self.best if self.steps else None

    @isolated
    def step_packed(self, prepared: Prepared) -> None:
        readers = iter(prepared.launched)
        for packed in prepared.packed:
            seen = {}
            for number, group in enumerate(packed.groups):
                own = list(islice(readers, len(group.kv_lens)))
                if any(reader.request.state.req_id in self.steps for reader in own):
                    seen[number] = SeenGroup(group, own)
            if seen:
                packed.layers = partial(SeenLayers, self, seen)
                self.groups += seen.values()
        if prepared.filled is not None:
            self.replayed = prepared.filled, prepared.replayed

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
    def head_read(self, hidden: torch.Tensor, requests: Sequence[HeadRequest]) -> None:
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
    def step_ended(self, requests: Sequence[HeadRequest], counts: Counts) -> None:
        self.denoiser.head.best = None
        if self.denoiser.device.type == "cuda" and self.groups:
            torch.cuda.current_stream().synchronize()  # over, unless the head had nothing to read
        for group in self.groups:
            group.tell(self.steps, self.layers)
        if self.replayed is not None:
            self._tell_replayed(*self.replayed)
        self.groups, self.replayed = [], None
        for request in requests:
            if (seen := self.steps.get(request.state.req_id)) is not None:
                seen.tokens = request.proposal.token
                seen.best = None if request.best is None else request.best.reshape(2, BEST, -1)
                seen.ms = 1000 * (perf_counter() - self.begin)

    def _tell_replayed(self, filled: Filled, readers: list[Reader]) -> None:
        (group,) = filled.packed.groups
        counts = ByCanvas(self, filled.own)
        filled.step.recorded.repeat(filled.bucket, filled.packed, filled.own, counts)
        fed = [number for phase, number, _ in filled.step.recorded.events if phase == "feed_forward"]
        everywhere = sum(number == filled.bucket.rows for number in fed)
        others = len(fed) - everywhere
        for canvas, reader in enumerate(readers):
            stream = reader.stream
            if (seen := self.steps.get(reader.request.state.req_id)) is None:
                continue
            leading, forced = group.leading[0][canvas], stream.forced
            left = stream.num_rows - len(forced)
            shares = np.full(stream.num_rows, (leading - len(forced)) / left if left else 0.0)
            shares[forced] = 1.0
            through = everywhere * stream.num_rows + others * leading
            counted = through, counts.read[canvas], counts.there[canvas]
            add(seen, reader, self.layers, counted, (everywhere + others * shares) / self.layers)
