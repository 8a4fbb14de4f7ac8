"""Small steps are replayed from CUDA graphs, because a GPU runs them faster than the host can launch them.

A step is captured for a bucket of rows and streams, over memory with fixed
addresses: its tables and its hidden states. A later step of that bucket is
padded with dummy streams, whose blocks are vLLM's null block. Its tables
overwrite the captured ones, and the launches are replayed. Host decisions of a
policy's flow are part of the bucket.

- Partial steps of the server's own policy are captured at start and never evicted.
- Other steps, including those that recompute whole canvases, are captured on their second use. The least recently used
  ones are evicted when memory is needed.
- Steps of more than 2,048 rows are launched, because launching them takes less time than computing them.
- A step that cannot be captured is refused and always launched.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch

from vllm_dlm.cache.budget import BlockShape
from vllm_dlm.canvas.commit import NOTHING
from vllm_dlm.canvas.stream import Stream
from vllm_dlm.client_cache import ClientCache
from vllm_dlm.plugins.reuse.base import Reuse, StepPlan, span
from vllm_dlm.step.batch import Batch, Limits, UncapturedRowsError
from vllm_dlm.step.buckets import CANVASES, LEADING, ROWS, Bucket, Costs, bucket_of, leading_rows, shares, sizes
from vllm_dlm.step.counts import Counts
from vllm_dlm.step.cuda_graphs import Capture, Graph, PoolLost
from vllm_dlm.step.failures import describe
from vllm_dlm.step.packing import NULL_BLOCK, pack
from vllm_dlm.step.upload import Upload

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM configures loggers under its own name only

#: number of launches of a bucket before it is captured, since capturing a step that occurs once does not pay off
LAUNCHES = 1
#: the same after an eviction; these launches take about as much time as a capture
LAUNCHES_AFTER_EVICTION = 16
#: bytes of staging memory for all tables of a captured step except those of KV blocks
TABLES = 1 << 22


class CountEvent(NamedTuple):
    """Counted work of a captured step, proportional to a number of rows"""

    phase: str | None  # projection; None: attention
    rows: Literal["all", "leading"]
    read: bool = False  # attention reads keys from pages


@dataclass
class RecordedCounts(Counts):
    """Records the counts of a step during its capture, to repeat them for each replay."""

    bucket: Bucket | None = None
    events: list[CountEvent] = field(default_factory=list)

    def projected(self, phase: str, rows: int) -> None:
        self.events.append(CountEvent(phase, self._which(rows)))

    def attended(self, q_lens: list[int], kv_lens: list[int], read: bool, dense: list[int] | None = None) -> None:
        self.events.append(CountEvent(None, self._which(sum(q_lens)), read))

    def _which(self, rows: int) -> Literal["all", "leading"]:
        assert self.bucket is not None and rows in (self.bucket.rows, self.bucket.leading), "rows of a captured step"
        return "all" if rows == self.bucket.rows else "leading"

    def repeat(self, batch: Batch, streams: int, counts: Counts) -> None:
        """Counts a replay. The first `streams` streams of the batch are real, the others are dummies."""
        (group,) = batch.groups
        for event in self.events:
            rows = (group.all.counts if event.rows == "all" else group.leading_counts)[:streams]
            if event.phase is None:
                counts.attended(rows, group.kv_lens[:streams], read=event.read)
            else:
                counts.projected(event.phase, sum(rows))


class CapturedStep(NamedTuple):
    bucket: Bucket
    graph: Graph
    hidden: torch.Tensor  # [rows, E], overwritten by each replay
    tables: dict[str, tuple]  # name -> address, shape and dtype of each table that the graph reads, see Upload.layout
    counts: RecordedCounts


class PaddedStep(NamedTuple):
    """Streams of a step, padded to the size of a captured step, which is replayed with their tables."""

    step: CapturedStep
    batch: Batch  # the streams and dummy streams
    upload: Upload  # sends the tables to the addresses that the graph reads
    streams: int  # number of streams that are not dummies

    def replay(self, counts: Counts) -> torch.Tensor:
        """-> [rows, E]"""
        self.step.graph.replay()
        self.step.counts.repeat(self.batch, self.streams, counts)
        return self.step.hidden


class CapturedSteps:
    def __init__(
        self,
        run: Callable[[Batch, Counts], torch.Tensor],  # all layers -> hidden states of all live rows [rows, E]
        capture: Capture,
        shape: BlockShape,
        device: torch.device,
        longest: int,  # maximum number of positions of a canvas
        most_rows: int,  # maximum number of rows of a step, for which workspaces are allocated
        room: int,  # bytes left for captured steps
        costs: Costs,
        verify: Callable[[torch.device], None] = lambda device: None,  # raises if the device no longer works
    ):
        self.run, self.capture, self.shape, self.room, self.costs = run, capture, shape, room, costs
        self.device, self.verify = device, verify
        self.longest, self.table_width, self.most_rows = longest, -(-longest // shape.block_size), most_rows
        self.sizes = frozenset(sizes(longest))
        #: memory from which graphs read their tables, shared by all captured steps
        self.upload = Upload(device, stays=TABLES + max(CANVASES) * self.table_width * np.dtype(np.int32).itemsize)
        self.pinned: dict[Bucket, CapturedStep] = {}  # captured at start
        self.served: ClientCache[Bucket, CapturedStep] = ClientCache("captured_steps", self._evicted)
        #: remaining launches before a bucket is captured
        self.waiting: ClientCache[Bucket, int] = ClientCache("seen_steps")
        #: key of steps that cannot be captured -> minimum number of rows at which capturing failed; 0: fails at any
        #: size
        self.refused: ClientCache[tuple, int] = ClientCache("refused_steps")

    @property
    def steps(self) -> dict[Bucket, CapturedStep]:
        return self.pinned | {step.bucket: step for step in self.served.values()}

    def pad(self, streams: list[Stream]) -> PaddedStep | None:
        """The streams padded with dummies to a captured step; None: the step must be launched"""
        if (step := self.can_replay(streams)) is None:
            return None
        batch = self._batch(step.bucket, streams[0].reuse, streams)
        assert self.upload.layout == step.tables, "the tables of a replay must be where the graph reads them"
        return PaddedStep(step, batch, self.upload, len(streams))

    def can_replay(self, streams: list[Stream]) -> CapturedStep | None:
        """The captured step for these streams, captured now if it is due"""
        bucket = bucket_of(streams)
        if bucket is None or not self._has_place(streams, bucket):
            return None
        return self._step(bucket, streams[0].reuse)

    def _has_place(self, streams: list[Stream], bucket: Bucket) -> bool:
        """Whether the dummy streams can hold the padding rows"""
        padding = bucket.rows - sum(stream.num_rows for stream in streams)
        each = self.longest if bucket.whole else self.longest - 1
        return padding <= (bucket.canvases - len(streams)) * each

    def _step(self, bucket: Bucket, reuse: Reuse) -> CapturedStep | None:
        step = self.pinned.get(bucket) or self.served.get(bucket)
        if step is not None or not self._may_capture(bucket, reuse):
            return step
        launches = self.waiting.get(bucket)
        if launches is None:
            launches = LAUNCHES
        if launches:
            self.waiting.put(bucket, launches - 1)
            return None
        if not self._make_room(bucket) or (step := self._captured(bucket, reuse)) is None:
            return None
        return self.served.put(bucket, step)

    def capture_all(self, stream: Stream) -> None:
        """Captures partial steps of all sizes for streams like this one and keeps them. The largest are captured first,
        because the others reuse their memory."""
        like = bucket_of([stream])
        if like is None or like.whole:
            return
        for rows, canvases in sizes(self.longest):
            for part in LEADING if like.leading else (0,):
                bucket = like._replace(rows=rows, canvases=canvases, leading=rows // part if part else 0)
                if not self._may_capture(bucket, stream.reuse) or not self._make_room(bucket):
                    continue
                if (step := self._captured(bucket, stream.reuse)) is not None:
                    self.pinned[bucket] = step

    # -- bounds ----------------------------------------------------------------------------

    def _may_capture(self, bucket: Bucket, reuse: Reuse) -> bool:
        if bucket.rows > self.most_rows or not (bucket.whole or (bucket.rows, bucket.canvases) in self.sizes):
            return False
        failed = (self.refused.get(key) for key in (bucket.flow, policy_key(bucket, reuse)))
        return all(rows is None or bucket.rows < rows for rows in failed)

    def _make_room(self, bucket: Bucket) -> bool:
        """Evicts steps, the least recently used first, if that frees enough memory."""
        cost = self.costs.step(bucket.rows)
        if cost > self.room + sum(self.costs.step(step.bucket.rows) for step in self.served.values()):
            return False
        while cost > self.room:
            self.served.evict()
        return True

    def _evicted(self, step: CapturedStep) -> None:
        self.room += self.costs.step(step.bucket.rows)
        self.waiting.put(step.bucket, LAUNCHES_AFTER_EVICTION)

    def _refuse(self, bucket: Bucket, reuse: Reuse, error: Exception) -> None:
        """Refuses the policy from this size on, and at every size after a second failure. The number of failed captures
        is therefore bounded by the number of installed policies, for any values of their fields."""
        key = policy_key(bucket, reuse)
        rows = bucket.rows if self.refused.get(key) is None else 0
        self.refused.put(key, rows)
        at = f"of at least {rows} rows " if rows else ""
        why = describe(error.__cause__ if isinstance(error.__cause__, Exception) else error)
        logger.warning("Steps %swith reuse %r cannot be captured and are launched: %s", at, reuse.name, why)

    # -- capturing -------------------------------------------------------------------------

    def _captured(self, bucket: Bucket, reuse: Reuse) -> CapturedStep | None:
        """Captures a step of dummies; None: capturing failed and the step must be launched. Raises only if the device
        is faulty."""
        recorded = RecordedCounts(bucket=bucket)
        try:
            batch, tables = self._batch(bucket, reuse, []), self.upload.layout
            self.upload.send()

            def run(counts: Counts = recorded) -> torch.Tensor:
                batch.groups[0].begin()
                return self.run(batch, counts)

            run(Counts())  # compilation and allocations that are not part of the graph
            graph, hidden = self.capture(run)
        except UncapturedRowsError:
            self.refused.put(bucket.flow, 0)
            return None
        except torch.OutOfMemoryError as error:
            logger.warning("No more steps are captured: %s", error)
            self.room = 0
            return None
        except Exception as error:
            self.verify(self.device)
            if isinstance(error, PoolLost):  # the next pool allocates its own activations
                self.room -= self.costs.working(max(ROWS))
            self._refuse(bucket, reuse, error)
            return None
        self.room -= self.costs.step(bucket.rows)
        counts = RecordedCounts(bucket=bucket, events=list(recorded.events))
        return CapturedStep(bucket, graph, hidden, tables, counts)

    def _batch(self, bucket: Bucket, reuse: Reuse, streams: list[Stream]) -> Batch:
        """The streams, and dummy streams that share the padding rows. Arrays have the same sizes and order for all
        steps of a bucket, and therefore the same addresses in the memory that its graph reads."""
        missing = bucket.canvases - len(streams)
        rows = bucket.rows - sum(stream.num_rows for stream in streams)
        leading = bucket.leading - (leading_rows(streams) if bucket.leading else 0)
        padding = zip(shares(rows, missing), shares(leading, missing), strict=True)
        streams = streams + [self._dummy_stream(bucket, reuse, *size) for size in padding]
        self.upload.begin()
        limits = Limits(bucket.rows, self.longest, self.table_width)
        batch = pack(streams, self.upload, self.shape, masks=True, limits=limits)
        (group,) = batch.groups
        assert group.all_keep == bucket.all_keep, "the padded batch must keep features like its bucket"
        return batch

    def _dummy_stream(self, bucket: Bucket, reuse: Reuse, rows: int, leading: int) -> Stream:
        """A stream of the bucket's kind whose blocks are vLLM's null block"""
        live = span(0, rows)
        budget = leading if bucket.leading else None
        plan = StepPlan(live, live if bucket.dense else live[:0], budget, rows, refresh=False)
        length = rows if bucket.whole else rows + 1  # a partial step leaves positions out
        _, cached, _ = bucket.kind
        return Stream(
            reuse,
            plan,
            np.zeros(length, np.int64),
            NOTHING,
            NOTHING,
            (0, length),
            feature_rows=length if bucket.all_keep else 0,
            kv_table=np.full(self.table_width, NULL_BLOCK) if cached else None,
            feature_table=np.full(length, NULL_BLOCK),
        )


def policy_key(bucket: Bucket, reuse: Reuse) -> tuple:
    """Key of steps that fail together: a class of policies, regardless of its fields, and a kind of step"""
    return type(reuse), *bucket.kind[1:], bucket.dense, bucket.all_keep
