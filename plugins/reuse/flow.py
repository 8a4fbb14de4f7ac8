"""Building blocks for the flow of a layer: asks, rows, and the view of a layer.

A policy writes one transformer layer as a generator. It yields an ask, which
names a computation, and is sent the result. n rows; H and Hkv heads of D
numbers each:

    q, k, v = yield QueryKeyValue(h, rows)      # [n, H, D] rotated, [n, Hkv, D] rotated, [n, Hkv, D]
    context = yield Attend(q, rows)             # [n, H * D]
    output = yield Output(context)              # [n, E]
    x, ffn = yield FeedForward(x, output)       # x + output, and the FFN's output for it, [n, E] each
    return rows, x, ffn

Queries, keys and values can be computed together or separately, for the same
rows or for different ones. New keys and values are written to the cache at
once. The engine drives the flows of all policies of a batch in lockstep: asks
of one type become one product, in the order of ORDER. Rows of different
policies share that product, and policies are independent of each other.

A flow returns two summands of the residual stream after the layer, which the
next layer adds up. It returns them for all live rows, except that the flow of
the last layer may return fewer rows, which it names.

Nothing here waits for the device. If only the device knows which rows are
selected, `Layer.where` decides how they are represented.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


@dataclass(frozen=True, eq=False)
class Rows:
    """A subset of the live rows, ascending, canvas by canvas."""

    index: torch.Tensor | None  # [n] into the live rows; None: all of them
    counts: list[int]  # number of rows of each canvas; upper bounds if only the device knows
    #: [C + 1] int32: where each canvas's rows begin among these; None: given by `counts`
    starts: torch.Tensor | None = None
    #: [n] bool: rows that are selected. The others are computed but ignored; None: all are selected
    mask: torch.Tensor | None = None
    #: for selections of keys: number of rows of each canvas before its response, None: only the device knows; and
    #: tensors that follow from the index, by name, which several layers need
    before: list[int] | None = None
    found: dict[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(self.counts)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """These rows of a tensor of all live rows; not a copy if these are all live rows."""
        return tensor if self.index is None else tensor[self.index]

    def once(self, name: str, make: Callable[[torch.Tensor], torch.Tensor], everything: torch.Tensor) -> torch.Tensor:
        """`make(index)`, called once for all layers; `everything` if these are all live rows."""
        if self.index is None:
            return everything
        if name not in self.found:
            self.found[name] = make(self.index)
        return self.found[name]

    def set(self, tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """A tensor of all live rows with `values` in these rows; unselected rows keep their old values."""
        if self.mask is not None:
            values = torch.where(over(self.mask, values), values, self.gather(tensor))
        return values if self.index is None else tensor.index_copy(0, self.index, values)

    def places(self, some: "Rows") -> torch.Tensor | slice:
        """Indices of `some`, a subset of these rows, within these rows."""
        if some.index is None:
            return slice(None)
        return some.index if self.index is None else torch.searchsorted(self.index, some.index)


@dataclass(frozen=True, eq=False)
class PickedRows:
    """The m of n rows for which a mask is true."""

    rows: Rows
    place: torch.Tensor | None  # [m] indices within the n rows; None: all n rows are kept and `rows.mask` selects

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[n, …] -> [m, …]"""
        return tensor if self.place is None else tensor[self.place]

    def set(self, tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """[n, …] with values [m, …] in the picked rows."""
        if self.place is not None:
            return tensor.index_copy(0, self.place, values)
        return values if self.rows.mask is None else torch.where(over(self.rows.mask, values), values, tensor)


def over(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """mask [n], reshaped to broadcast over values [n, …]"""
    return mask.view(-1, *[1] * (values.dim() - 1))


# -- asks, in the order of a layer ---------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Heads:
    """Projections of normalized rows. Queries and keys are returned rotated. Keys and values also go to the cache."""

    inputs: torch.Tensor  # [n, E] normalized
    rows: Rows  # [n] rows that the inputs belong to


class Value(Heads):
    """-> v"""


class QueryKeyValue(Heads):
    """-> q, k, v"""


class KeyValue(Heads):
    """-> k, v"""


class QueryKey(Heads):
    """-> q, k"""


class Query(Heads):
    """-> q"""


class Key(Heads):
    """-> k"""


@dataclass(frozen=True, eq=False)
class AttendMoved:
    """-> change of the queries' contexts caused by changed values"""

    q: torch.Tensor  # [n, H, D]
    rows: Rows  # [n] rows of the queries
    changed: Rows  # [S] rows whose values changed
    moved: torch.Tensor  # [S, Hkv, D] by how much
    unused: PickedRows | None = None  # rows among the n with unused results, which must be finite


@dataclass(frozen=True, eq=False)
class Attend:
    """-> contexts over the keys and values of the row's canvas: the cached ones, or k and v if given"""

    q: torch.Tensor  # [n, H, D]
    rows: Rows  # [n] rows of the queries
    k: torch.Tensor | None = None  # [T, Hkv, D] of every live row
    v: torch.Tensor | None = None  # [T, Hkv, D]


@dataclass(frozen=True, eq=False)
class Output:
    context: torch.Tensor  # [n, H * D]


@dataclass(frozen=True, eq=False)
class FeedForward:
    """-> x + output [n, E], and the FFN output of all n rows or of the picked ones, [m, E]"""

    x: torch.Tensor  # [n, E] the residual stream, not normalized
    output: torch.Tensor | None = None  # [n, E] projected attention output, which is added to x
    picked: PickedRows | None = None


Ask = Heads | AttendMoved | Attend | Output | FeedForward
ORDER: tuple[type, ...] = (
    Value,
    QueryKeyValue,
    KeyValue,
    QueryKey,
    Query,
    Key,
    AttendMoved,
    Attend,
    Output,
    FeedForward,
)
#: result of a flow: rows, and the two summands of the residual stream after the layer
LayerResult = tuple[Rows, torch.Tensor, torch.Tensor]
Flow = Generator[Ask, Any, LayerResult]


# -- input of a flow -----------------------------------------------------------------------------


@dataclass
class Columns:
    """Properties of each live row that are known before the first layer; T rows."""

    forced: torch.Tensor  # [T] bool: always recomputed, by the plan or because the row's token just changed
    changed: torch.Tensor  # [T] bool: the row's token just changed
    fresh: torch.Tensor  # [T] bool: the set of keys that the row may read changes in this step
    #: state that a flow passes on to the next layer
    carried: dict[str, Any] = field(default_factory=dict)


class Layer(Protocol):
    """One layer in one step, as seen by the flow of a group: canvases with the same policy and kind of step; T rows."""

    index: int  # of the layer
    last: bool
    whole: bool  # every row of every canvas is recomputed
    x: torch.Tensor  # [T, E] the residual stream
    h: torch.Tensor  # [T, E] normalized
    columns: Columns
    all: Rows
    forced: Rows  # rows with `columns.forced`
    response: Rows  # rows from which the response is read; only these are needed after the last layer
    wanted: Rows  # in a whole step: rows that the head reads or whose features are kept
    all_keep: bool  # every live row keeps features

    def inputs(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """These rows of `x` and `h`"""

    def where(self, mask_T: torch.Tensor, rows: Rows) -> PickedRows:
        """The rows among `rows` for which the mask, given for all live rows, is true."""

    def least_similar(self, similarity_T: torch.Tensor) -> Rows:
        """The forced rows, and in each canvas the least similar other rows, as many as the plan's budget allows. Ties
        go to the lowest row."""

    def similarity(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """Cosine similarity of rows [n, …] over all heads of all ranks, in float32: [n]"""

    def cached_values(self, rows: Rows) -> torch.Tensor:
        """Cached values [n, Hkv, D]. Call this before an ask that overwrites them."""

    def features(self, rows: Rows) -> torch.Tensor:
        """Cached features [n, W]; undefined for rows that keep none."""

    def keep(self, rows: Rows, features: torch.Tensor) -> None:
        """Stores features [n, W]; a no-op for rows that keep none."""


# -- flows that policies share -------------------------------------------------------------------


#: (context [n, H * D], output [n, E], ffn [n, E]) -> features of the rows, [n, W]
Kept = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def heads(at: Layer, queried: Rows, renewed: Rows) -> Generator[Ask, Any, tuple[torch.Tensor, ...]]:
    """-> q of `queried`, k and v of `renewed`, in one product if both are the same rows"""
    if queried.index is renewed.index:
        return (yield QueryKeyValue(renewed.gather(at.h), renewed))
    q = yield Query(queried.gather(at.h), queried)
    k, v = yield KeyValue(renewed.gather(at.h), renewed)
    return q, k, v


def dense(at: Layer, kept: Kept | None = None) -> Flow:
    """Computes every row of the canvas completely, with new keys and values."""
    # Only the head and the features use the last layer's output, so only their rows are queried there.
    rows = at.wanted if at.last else at.all
    q, k, v = yield from heads(at, rows, at.all)
    context = yield Attend(q, rows, k, v)
    output = yield Output(context)
    x, ffn = yield FeedForward(rows.gather(at.x), output)
    if kept is not None:
        at.keep(rows, kept(context, output, ffn))
    return rows, x, ffn


def cached(at: Layer) -> Flow:
    """Computes the live rows completely, attending to their new keys and values and to cached ones of other rows."""
    q, _, _ = yield QueryKeyValue(at.h, at.all)
    context = yield Attend(q, at.all)
    output = yield Output(context)
    x, ffn = yield FeedForward(at.x, output)
    return at.all, x, ffn
