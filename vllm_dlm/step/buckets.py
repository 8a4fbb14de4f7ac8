"""Sizes of captured steps: the bucket of rows and canvases for a step, and its memory cost."""

from collections.abc import Hashable
from typing import Any, NamedTuple

from vllm_dlm.canvas.stream import Stream
from vllm_dlm.plugins.reuse.base import Reuse

ROWS = (32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)
#: Whole canvases are padded to a multiple of it: padding rows cost as much as others.
WHOLE_ROWS = 128
CANVASES = (1, 2, 4, 8, 16, 32)
#: With more than two canvases, sizes that average fewer rows per canvas are skipped.
ROWS_OF_MANY = 16
#: Sizes with more rows than that need at least MANY canvases.
ROWS_OF_ONE, MANY = 1024, 8
#: Shares of the rows that a policy with a budget recomputes in a layer
LEADING = (8, 4, 2)
#: Bytes of a graph per layer: two dozen launches of some 10 KiB each
LAYER = 1 << 18


class Bucket(NamedTuple):
    """Properties shared by all steps that replay the same captured step."""

    kind: tuple[Hashable, bool, bool]  # layer_key of the policy; canvases have KV blocks; canvases are whole
    dense: bool  # all live rows are recomputed
    all_keep: bool  # all live rows keep features
    rows: int
    canvases: int
    leading: int  # rows recomputed per layer under a budget; 0: no budget

    @property
    def whole(self) -> bool:
        return self.kind[2]

    @property
    def flow(self) -> tuple:
        """Properties that determine the launched operations, apart from sizes"""
        return self.kind, self.dense, self.all_keep, self.leading > 0


class Costs(NamedTuple):
    """Upper bounds on the device memory of captured steps: hidden states and launches of each step, and the activations
    of the largest one, which all steps share."""

    layers: int
    hidden: int
    inner: int  # width of a layer's widest rows
    itemsize: int

    def step(self, rows: int) -> int:
        """Bytes"""
        return rows * self.hidden * self.itemsize + self.layers * LAYER

    def room(self, longest: int) -> int:
        """Bytes for all partial steps of one policy with a budget, which has the most sizes, and canvases of at most
        `longest` positions. Whole canvases and other policies use the remaining memory."""
        captured = sizes(longest) * len(LEADING)
        return self.working(max(ROWS)) + sum(self.step(rows) for rows, _ in captured) if captured else 0

    def working(self, rows: int) -> int:
        return rows * 4 * (self.inner + 2 * self.hidden) * self.itemsize


def layer_key(reuse: Reuse) -> Hashable:
    """Policies with equal keys launch the same layers. A subclass may read fields that its base does not, so
    `layer_key` is used only if the policy's own class defines it; otherwise the key consists of all fields."""
    policy: Any = reuse
    return policy.layer_key if "layer_key" in vars(type(policy)) else policy


def bucket_of(streams: list[Stream]) -> Bucket | None:
    """The smallest bucket that holds the streams; None: they are never captured."""
    first = streams[0]
    if first.selected is not None or first.hidden_row is not None or not (first.whole or first.cached):
        return None
    if any(alike(stream) != alike(first) for stream in streams):
        return None
    if not first.whole and any(stream.plan.live[0] < stream.response[0] for stream in streams):
        return None  # computing live prompt rows takes longer than launching the step
    rows, leading = sum(stream.num_rows for stream in streams), leading_rows(streams)
    kind = layer_key(first.reuse), first.cached, first.whole
    shape = kind, dense(first), all(map(keeps, streams))
    if first.whole:
        return bucket_of_whole(shape, rows, len(streams))
    for canvases in CANVASES:
        for size in ROWS:
            spare = size - rows
            # padding rows need a dummy canvas
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
    """Dummy canvases have at least one row each, since all canvases are whole."""
    for canvases in CANVASES:
        missing = canvases - number
        size = -(-(rows + missing) // WHOLE_ROWS) * WHOLE_ROWS
        if missing >= 0 and size <= max(ROWS) and (missing or size == rows):
            return Bucket(*shape, size, canvases, 0)
    return None


def sizes(longest: int) -> list[tuple[int, int]]:
    """(rows, canvases) of partial steps, the largest first. A partial step has fewer rows than positions."""
    return [
        (rows, canvases)
        for rows in reversed(ROWS)
        for canvases in reversed(CANVASES)
        if is_common(rows, canvases) and rows <= canvases * (longest - 1)
    ]


def is_common(rows: int, canvases: int) -> bool:
    few_rows = rows < ROWS_OF_MANY * canvases and canvases > 2
    return not few_rows and (rows <= ROWS_OF_ONE or canvases >= MANY)


def alike(stream: Stream) -> tuple:
    """Properties shared by all streams of a captured step"""
    return stream.kind, dense(stream), has_budget(stream)


def dense(stream: Stream) -> bool:
    """All live rows are recomputed."""
    return len(stream.plan.forced) == len(stream.plan.live)


def has_budget(stream: Stream) -> bool:
    """The plan sets the number of recomputed rows, and the flow selects them."""
    return stream.plan.budget is not None and not dense(stream)


def keeps(stream: Stream) -> bool:
    """All live rows keep features."""
    return stream.plan.live[0] >= len(stream.token_ids) - stream.feature_rows


def leading_rows(streams: list[Stream]) -> int:
    return sum(stream.leading for stream in streams)


def shares(number: int, parts: int) -> list[int]:
    """`number` in parts that differ by at most one, the larger ones first"""
    return [number // parts + (part < number % parts) for part in range(parts)]
