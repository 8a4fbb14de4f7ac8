"""Records steps of observed requests in a worker, in addition to commits: an observer of the denoiser.

It is attached while requests are observed. A forward with an observed canvas gets a `ForwardObserver`, which records on
the device which rows pass the feed-forward and which keys a selection reads. The records are copied to the host
together with the output of the head. A replayed CUDA graph cannot be observed, so its record is derived on the host:
the rows that the plan fixes, and for a policy with a budget the mean share of the other rows.

An error ends the view of the observed requests of its step, and the step continues (see isolation.py).
"""

from collections.abc import Sequence
from itertools import islice
from time import perf_counter

import numpy as np
import torch

from vllm_dlm.canvas.denoising import Denoising
from vllm_dlm.canvas.stream import Reading, Stream
from vllm_dlm.plugins.reuse.flow import Ask
from vllm_dlm.step.captured import PaddedStep
from vllm_dlm.step.counts import Counts
from vllm_dlm.step.denoiser import Denoiser, Observer, PreparedStep
from vllm_dlm.step.head import most_probable
from vllm_dlm.view.isolation import Isolated, isolated
from vllm_dlm.view.seen import CanvasCounts, GroupRecord, StepRecord, add

#: number of most probable tokens that are reported for a guess
BEST = 4


class ForwardObserver:
    """A LayerObserver that reports groups with observed canvases to `seeing`"""

    def __init__(self, seeing: "StepRecorder", seen: dict[int, GroupRecord]):
        self.seeing, self.seen = seeing, seen  # `seen`: by index of the group

    def asked(self, asks: dict[int, Ask]) -> None:
        self.seeing.asked(self.seen, asks)

    def attention_counts(self, group: int, counts: Counts) -> Counts:
        self.total = counts
        return self.seeing.counts_of(self.seen.get(group)) or counts

    def attended(self, group: int, layer: int, counts: Counts) -> None:
        if isinstance(counts, CanvasCounts):
            counts.add_to(self.total)
            self.seeing.attended(self.seen[group], layer, counts)


class StepRecorder(Observer, Isolated):
    def __init__(self, denoiser: Denoiser):
        self.denoiser, self.attached = denoiser, False
        self.layers = len(denoiser.model.model.layers)
        self.observed: set[str] = set()  # observed requests of the runner
        self.current: list[str] = []  # requests of this step
        self.steps: dict[str, StepRecord] = {}
        self.groups: list[GroupRecord] = []
        self.replayed: tuple[PaddedStep, list[Stream]] | None = None

    @property
    def subject(self) -> str:
        return f"requests {', '.join(self.steps)}"

    def attach(self, observed: set[str], current: list[str]) -> None:
        """Called before a step. `observed`: observed requests; `current`: requests of this step"""
        self.observed, self.current = observed, current
        self._attach()

    @isolated
    def _attach(self) -> None:
        wanted = bool(self.observed)
        if wanted != self.attached:
            self.attached = wanted
            (self.denoiser.observers.append if wanted else self.denoiser.observers.remove)(self)

    def take(self) -> dict[str, StepRecord]:
        """Called after a step -> record of each observed request"""
        taken, self.steps, self.fault = self.steps, {}, None
        self.groups, self.replayed, self.denoiser.head.best = [], None, None
        return taken

    def fail(self, error: Exception) -> None:
        """Ends the view of the observed requests of this step. `take` resets the recorder for the next step."""
        self.steps = {name: StepRecord() for name in self.current if name in self.observed}
        super().fail(error)
        for seen in self.steps.values():
            seen.fault = self.fault
        self.observed -= self.steps.keys()

    # -- a step ----------------------------------------------------------------------------

    @isolated
    def step_begins(self, states: Sequence[Denoising]) -> None:
        self.steps = {
            state.req_id: StepRecord(rows=np.zeros(state.canvas.rows))
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
                    seen[number] = GroupRecord(group, own)
            if seen:
                batch.observer = ForwardObserver(self, seen)
                self.groups += seen.values()
        if prepared.padded is not None:
            self.replayed = prepared.padded, prepared.replayed

    # -- in a layer ------------------------------------------------------------------------

    @isolated
    def asked(self, seen: dict[int, GroupRecord], asks: dict[int, Ask]) -> None:
        for number, ask in asks.items():
            if number in seen:
                seen[number].asked(ask)

    @isolated
    def counts_of(self, group: GroupRecord | None) -> CanvasCounts | None:
        return None if group is None else CanvasCounts(len(group.group.kv_lens), self.count_keys)

    @isolated
    def count_keys(self, counts: CanvasCounts, q_lens: list[int], kv_lens: list[int], dense: list[int]) -> None:
        for canvas, (queries, keys, there) in enumerate(zip(q_lens, kv_lens, dense, strict=True)):
            if queries:
                counts.read[canvas] += keys
                counts.there[canvas] += there

    @isolated
    def attended(self, group: GroupRecord, layer: int, counts: CanvasCounts) -> None:
        group.attended(layer, counts)

    # -- after the layers ------------------------------------------------------------------

    @isolated
    def head_read(self, hidden: torch.Tensor, readings: Sequence[Reading]) -> None:
        for group in self.groups:
            group.bring()

    def best(self, logits_RV: torch.Tensor) -> torch.Tensor:
        """-> [2 * BEST, R], see `most_probable`; zeros after an error, because the head concatenates several results"""
        found = self._most_probable(logits_RV)
        return logits_RV.new_zeros(2 * BEST, len(logits_RV), dtype=torch.float64) if found is None else found

    @isolated
    def _most_probable(self, logits_RV: torch.Tensor) -> torch.Tensor:
        return most_probable(logits_RV, BEST)

    @isolated
    def step_ended(self, readings: Sequence[Reading], counts: Counts) -> None:
        self.denoiser.head.best = None
        if self.denoiser.device.type == "cuda" and self.groups:
            torch.cuda.current_stream().synchronize()  # usually already done by the head
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
        counts, recorded = CanvasCounts(padded.streams, self.count_keys), padded.step.counts
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
