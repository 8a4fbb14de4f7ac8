"""Steps whose launches are replayed: those which a GPU runs faster than the host can launch them.

A step is captured for a bucket of rows and canvases, over memory that stays:
the tables of its packing and its hidden states. A later step of the same shape
is filled up with canvases of nobody, which lie in the block that vLLM hands to
nobody, its tables are written over, and the launches are replayed. Whatever
flows decide by on the host is part of the shape. Steps between refreshes of the
server's own policy are captured before the first request, those of others when
they are met. Steps that recompute whole canvases, of at most 2,048 rows, are
captured when their size comes a second time: what comes once is not worth it.
Those of more rows keep the device busy for longer than their launches take.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from vllm.logger import init_logger

from vllm_dlm.cache.budget import BlockShape
from vllm_dlm.engine.canvas import NOTHING
from vllm_dlm.engine.counts import Counts
from vllm_dlm.engine.group import Packed, Unknown
from vllm_dlm.engine.packing import NULL_BLOCK, Limits, Stream, pack
from vllm_dlm.engine.upload import Upload
from vllm_dlm.plugins.reuse.base import StepPlan, span

logger = init_logger(f"vllm.{__name__}")

ROWS = (32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)
#: sizes of whole canvases are multiples of it: each row that nobody has is paid for
WHOLE_ROWS = 128
#: so many of those that came once; clients may think of ever other fields of a policy
REMEMBERED = 1024
CANVASES = (1, 2, 4, 8, 16, 32)
#: of more canvases than a few, that have fewer rows than so many on average, there is nothing of its own
ROWS_OF_MANY = 16
#: more rows than that are those of many canvases
ROWS_OF_ONE, MANY = 1024, 8
#: parts of the rows that a policy with a budget recomputes in a layer
LEADING = (8, 4, 2)
#: bytes that a layer's launches take in a graph: two dozen of them, some ten KiB each
LAYER = 1 << 18


class Graph(Protocol):
    """Launches that can be repeated."""

    def replay(self) -> None: ...


#: runs a function and remembers its launches
Capture = Callable[[Callable[[], torch.Tensor]], tuple[Graph, torch.Tensor]]


class Bucket(NamedTuple):
    kind: tuple  # of the streams
    dense: bool  # all that lives is recomputed
    all_keep: bool  # every live row keeps features
    rows: int
    canvases: int
    leading: int  # rows that a budget lets recompute in a layer; 0: there is no budget


@dataclass
class Recorded(Counts):
    """What a step counts, and by which of its rows that goes."""

    events: list[tuple[str | None, int, bool]] = field(default_factory=list)

    def projected(self, phase: str, rows: int) -> None:
        self.events.append((phase, rows, False))

    def attended(self, q_lens: list[int], kv_lens: list[int], read: bool, dense: list[int] | None = None) -> None:
        self.events.append((None, sum(q_lens), read))

    def repeat(self, bucket: Bucket, packed: Packed, own: int, counts: Counts) -> None:
        """The same of another step of that shape, whose first canvases are somebody's."""
        (group,) = packed.groups
        for phase, number, read in self.events:
            lengths = (group.all.counts if number == bucket.rows else group.leading[0])[:own]
            if phase is None:
                counts.attended(lengths, group.kv_lens[:own], read=read)
            else:
                counts.projected(phase, sum(lengths))


class Step(NamedTuple):
    """One that was captured."""

    graph: Graph
    hidden: torch.Tensor  # [rows, E]
    recorded: Recorded


class Filled(NamedTuple):
    """A step that is to be replayed."""

    bucket: Bucket
    step: Step
    packed: Packed  # of its own streams and of nobody's
    upload: Upload  # brings its tables
    own: int  # how many are its own

    def run(self, counts: Counts) -> torch.Tensor:
        """-> [rows, E]"""
        self.step.graph.replay()
        self.step.recorded.repeat(self.bucket, self.packed, self.own, counts)
        return self.step.hidden


class CapturedSteps:
    def __init__(
        self,
        run: Callable[[Packed, Counts], torch.Tensor],  # all layers -> hidden states of all live rows [rows, E]
        capture: Capture,
        shape: BlockShape,
        device: torch.device,
        longest: int,  # canvas
        room: int,  # bytes left to them
        cost: Callable[[int], int],  # rows of a step -> bytes that it takes of those
    ):
        self.run, self.capture, self.shape, self.room, self.cost = run, capture, shape, room, cost
        self.longest, self.table_width = longest, -(-longest // shape.block_size)
        self.sizes = frozenset(sizes(longest))
        self.upload = Upload(device, stays=True)  # one step's tables at a time
        self.steps: dict[Bucket, Step] = {}
        self.refused: set[Bucket] = set()  # a captured step does not know what their flows ask for
        self.once: set[Bucket] = set()  # of whole canvases: they came once

    def fill(self, streams: list[Stream]) -> Filled | None:
        """The streams in the memory of a captured step; None: there is none for them."""
        bucket = bucket_of(streams)
        if bucket is None or not self._has_place(streams, bucket):
            return None
        if streams[0].whole and bucket not in self.once:
            if len(self.once) >= REMEMBERED:
                self.once.clear()
            self.once.add(bucket)
            return None
        if not self._have(bucket, streams[0]):
            return None
        packed = self._packed(streams, streams[0], bucket)
        return Filled(bucket, self.steps[bucket], packed, self.upload, len(streams))

    def _has_place(self, streams: list[Stream], bucket: Bucket) -> bool:
        """The canvases of nobody can have the rows that are missing."""
        spare = bucket.rows - sum(stream.num_rows for stream in streams)
        each = self.longest if streams[0].whole else self.longest - 1
        return spare <= (bucket.canvases - len(streams)) * each

    def _have(self, bucket: Bucket, like: Stream) -> bool:
        if bucket in self.steps:
            return True
        possible = like.whole or (bucket.rows, bucket.canvases) in self.sizes
        known = possible and bucket not in self.refused
        return known and self.cost(bucket.rows) <= self.room and self._captured(like, bucket)

    def capture_all(self, like: Stream) -> None:
        """Steps of every size of canvases that are treated like this one, the largest first: the memory of the others
        is part of theirs. None, if its flow asks for what a captured step does not know."""
        if bucket_of([like]) is None:
            return
        for rows, canvases in sizes(self.longest):
            for part in LEADING if has_budget(like) else (0,):
                bucket = Bucket(like.kind, dense(like), keeps(like), rows, canvases, rows // part if part else 0)
                if not self._have(bucket, like):
                    return

    def _captured(self, like: Stream, bucket: Bucket) -> bool:
        packed, recorded = self._packed([], like, bucket), Recorded()
        self.upload.send()

        def run(counts: Counts = recorded) -> torch.Tensor:
            packed.groups[0].begin()
            return self.run(packed, counts)

        try:
            run(Counts())  # what is compiled or allocated once is no part of the launches
            graph, hidden = self.capture(run)
        except Unknown:
            self.refused.add(bucket)
            return False
        except torch.OutOfMemoryError as error:
            logger.warning("No more steps are captured: %s", error)
            self.room = 0
            return False
        self.steps[bucket] = Step(graph, hidden, Recorded(events=list(recorded.events)))
        self.room -= self.cost(bucket.rows)
        return True

    def _packed(self, streams: list[Stream], like: Stream, bucket: Bucket) -> Packed:
        """With canvases of nobody up to the bucket's size, which share the rows that are missing."""
        missing = bucket.canvases - len(streams)
        rows = bucket.rows - sum(stream.num_rows for stream in streams)
        leading = bucket.leading - (leading_rows(streams) if bucket.leading else 0)
        sizes = zip(shares(rows, missing), shares(leading, missing), strict=True)
        streams = streams + [self._nobody(like, *size) for size in sizes]
        self.upload.begin()
        limits = Limits(bucket.rows, self.longest, self.table_width)
        return pack(streams, self.upload, self.shape, masks=True, limits=limits)

    def _nobody(self, like: Stream, rows: int, leading: int) -> Stream:
        live = span(0, rows)
        budget = leading if has_budget(like) else like.plan.budget
        plan = StepPlan(live, live if dense(like) else live[:0], budget, rows, refresh=False)
        length = rows if like.whole else rows + 1  # not all of it lives, as in the others
        tokens, blocks = np.zeros(length, np.int64), np.full(self.table_width, NULL_BLOCK)
        feature_rows, feature_blocks = length if keeps(like) else 0, np.full(length, NULL_BLOCK)
        return Stream(
            like.reuse, plan, tokens, NOTHING, NOTHING, (0, length), feature_rows, blocks if like.cached else None,
            feature_blocks,
        )  # fmt: skip


def shares(number: int, parts: int) -> list[int]:
    """As even as can be, the larger ones first"""
    return [number // parts + (part < number % parts) for part in range(parts)]


def sizes(longest: int) -> list[tuple[int, int]]:
    """Rows and canvases of the steps that are captured, the largest first. A canvas has fewer rows than positions."""
    return [
        (rows, canvases) for rows in reversed(ROWS) for canvases in reversed(CANVASES)
        if is_common(rows, canvases) and rows <= canvases * (longest - 1)
    ]  # fmt: skip


class Costs(NamedTuple):
    """What captured steps take of the device's memory, at most: hidden states of each, what the largest works in, and
    the launches."""

    layers: int
    hidden: int
    inner: int  # of a layer's widest rows
    itemsize: int

    def step(self, rows: int) -> int:
        """Bytes"""
        return rows * self.hidden * self.itemsize + self.layers * LAYER

    def room(self, longest: int) -> int:
        """Bytes for all steps of a policy with a budget, which has the most of them, and canvases so long. What others
        leave of it is for whole canvases."""
        captured = sizes(longest) * len(LEADING)
        return self.working(max(ROWS)) + sum(self.step(rows) for rows, _ in captured) if captured else 0

    def working(self, rows: int) -> int:
        return rows * 4 * (self.inner + 2 * self.hidden) * self.itemsize


def bucket_of(streams: list[Stream]) -> Bucket | None:
    """The smallest that holds them; None: they are not to be captured."""
    first = streams[0]
    if first.view is not None or first.hole is not None or not (first.whole or first.cached):
        return None
    if any(stream.kind != first.kind or dense(stream) != dense(first) for stream in streams):
        return None
    if not first.whole and any(stream.plan.live[0] < stream.response[0] for stream in streams):
        return None  # with rows of the prompt it is long enough
    rows, leading = sum(stream.num_rows for stream in streams), leading_rows(streams)
    shape = first.kind, dense(first), all(map(keeps, streams))
    if first.whole:
        return bucket_of_whole(shape, rows, len(streams))
    for canvases in CANVASES:
        for size in ROWS:
            spare = size - rows
            # rows that are missing need a canvas that has them
            if canvases < len(streams) or spare < 0 or (spare > 0 and canvases == len(streams)):
                continue
            if not is_common(size, canvases):
                continue
            if not has_budget(first):
                return Bucket(*shape, size, canvases, 0)
            for part in LEADING:
                missing = size // part - leading
                if 0 <= missing <= spare and (missing == 0 or canvases > len(streams)):
                    return Bucket(*shape, size, canvases, size // part)
    return None


def bucket_of_whole(shape: tuple[tuple, bool, bool], rows: int, number: int) -> Bucket | None:
    """A canvas of nobody has a row at least: all are whole."""
    for canvases in CANVASES:
        missing = canvases - number
        size = -(-(rows + missing) // WHOLE_ROWS) * WHOLE_ROWS
        if missing >= 0 and size <= max(ROWS) and (missing or size == rows):
            return Bucket(*shape, size, canvases, 0)
    return None


def is_common(rows: int, canvases: int) -> bool:
    few_rows = rows < ROWS_OF_MANY * canvases and canvases > 2
    return not few_rows and (rows <= ROWS_OF_ONE or canvases >= MANY)


def dense(stream: Stream) -> bool:
    """All that lives is recomputed."""
    return len(stream.plan.forced) == len(stream.plan.live)


def has_budget(stream: Stream) -> bool:
    """A number of rows is recomputed, which may be none, and the flow says which."""
    return stream.plan.budget is not None and not dense(stream)


def keeps(stream: Stream) -> bool:
    """Every live row keeps features."""
    return stream.plan.live[0] >= len(stream.token_ids) - stream.feature_rows


def leading_rows(streams: list[Stream]) -> int:
    return sum(stream.leading for stream in streams)


def cuda_graph(function: Callable[[], torch.Tensor]) -> tuple[Graph, torch.Tensor]:
    graph = torch.cuda.CUDAGraph()
    # While it serves, other threads may call the device, too.
    with torch.cuda.graph(graph, pool=pool(), capture_error_mode="thread_local"):
        out = function()
    return graph, out


@cache
def pool():
    """Steps are never replayed side by side, so all of them work in the same memory."""
    return torch.cuda.graph_pool_handle()


class Repeated:
    """In the place of a graph where there is none: the function is called again, over the same memory."""

    def __init__(self, function: Callable[[], torch.Tensor]):
        self.function, self.out = function, function()

    def replay(self) -> None:
        self.out.copy_(self.function())


def repeated(function: Callable[[], torch.Tensor]) -> tuple[Graph, torch.Tensor]:
    graph = Repeated(function)
    return graph, graph.out
