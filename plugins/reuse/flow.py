"""What the flow of a layer is written with: asks, rows, and what a layer shows.

A policy writes one transformer layer as a generator. It yields what it wants
computed and is sent the result. n rows; H and Hkv heads of D numbers each:

    q, k, v = yield QueryKeyValue(h, rows)      # [n, H, D] rotated, [n, Hkv, D] rotated, [n, Hkv, D]
    context = yield Attend(q, rows)             # [n, H * D]
    output = yield Output(context)              # [n, E]
    x, ffn = yield FeedForward(x, output)       # x + output and what the FFN makes of it, [n, E] each
    return rows, x, ffn

Queries, keys and values can be asked for together or apart, of the same rows
or of others; new keys and values go to the cache as they are made. The engine
drives the flows of all policies of a batch in lockstep: asks of one type
become one product, the earliest type in this order first, so rows of different
policies share it and no policy knows of another. What is returned are the two
halves of the residual stream behind the layer, which the next one adds up: of
all live rows, or, in the last layer, of those that the flow names.

Nothing here waits for a device. Where only the device knows which rows are
meant, `Layer.where` decides how they are carried on.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


@dataclass(frozen=True, eq=False)
class Rows:
    """Some of the live rows, ascending, canvas after canvas."""

    index: torch.Tensor | None  # [n] into the live rows; None: all of them
    counts: list[int]  # how many of each canvas
    #: [C + 1] int32: where each canvas's rows begin among these; None: as `counts` say
    starts: torch.Tensor | None = None
    #: [n] bool: those that are meant. The others ride along because only the device knows; None: all are
    mask: torch.Tensor | None = None

    def __len__(self) -> int:
        return sum(self.counts)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """These rows of a tensor of all live rows; without a copy where all are meant."""
        return tensor if self.index is None else tensor[self.index]

    def set(self, tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """A tensor of all live rows with other values in these."""
        if self.mask is not None:
            values = torch.where(over(self.mask, values), values, self.of(tensor))
        return values if self.index is None else tensor.index_copy(0, self.index, values)

    def places(self, some: "Rows") -> torch.Tensor | slice:
        """Where `some` of these rows stand among them."""
        if some.index is None:
            return slice(None)
        return some.index if self.index is None else torch.searchsorted(self.index, some.index)


@dataclass(frozen=True, eq=False)
class Picked:
    """Those of n rows for which a mask is true; m of them."""

    rows: Rows
    place: torch.Tensor | None  # [m] where they stand among the n; None: where they stood, and `rows.mask` tells them

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """[n, …] -> [m, …]"""
        return tensor if self.place is None else tensor[self.place]

    def set(self, tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """[n, …] with other values [m, …] in these."""
        if self.place is not None:
            return tensor.index_copy(0, self.place, values)
        return values if self.rows.mask is None else torch.where(over(self.rows.mask, values), values, tensor)


def over(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """mask [n] in the shape of values [n, …]"""
    return mask.view(-1, *[1] * (values.dim() - 1))


# -- asks, in the order of a layer ---------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Heads:
    """Of normalised rows [n, E]. Queries and keys come rotated; keys and values also go to their rows' cache."""

    inputs: torch.Tensor  # [n, E]
    rows: Rows  # [n] whose they are


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
    """What the moved values of changed rows add to the contexts of queries."""

    q: torch.Tensor  # [n, H, D]
    rows: Rows  # [n] whose queries these are
    changed: Rows  # [S]
    moved: torch.Tensor  # [S, Hkv, D]


@dataclass(frozen=True, eq=False)
class Attend:
    """Contexts over the keys and values of the row's canvas: those in the cache, or new ones of every row."""

    q: torch.Tensor  # [n, H, D]
    rows: Rows  # [n] whose queries these are
    k: torch.Tensor | None = None  # [T, Hkv, D]
    v: torch.Tensor | None = None  # [T, Hkv, D]


@dataclass(frozen=True, eq=False)
class Output:
    context: torch.Tensor  # [n, H * D]


@dataclass(frozen=True, eq=False)
class FeedForward:
    """-> x + output [n, E], and the FFN of these rows or of those that are picked, [m, E]"""

    x: torch.Tensor  # [n, E] the residual stream, not normalised
    output: torch.Tensor | None = None  # [n, E] what attention adds to it
    picked: Picked | None = None


Ask = Heads | AttendMoved | Attend | Output | FeedForward
ORDER: tuple[type, ...] = (
    Value, QueryKeyValue, KeyValue, QueryKey, Query, Key, AttendMoved, Attend, Output, FeedForward,
)  # fmt: skip
#: rows, and the two halves of the residual stream behind the layer
Behind = tuple[Rows, torch.Tensor, torch.Tensor]
Flow = Generator[Ask, Any, Behind]


# -- what a flow sees ----------------------------------------------------------------------------


@dataclass
class Columns:
    """What is known of each live row before the first layer; T rows."""

    forced: torch.Tensor  # [T] bool: recomputed anyway, by the plan or because their token just changed
    changed: torch.Tensor  # [T] bool: their token just changed
    fresh: torch.Tensor  # [T] bool: the keys they may see change in this step
    #: what a flow hands to the next layer
    carried: dict[str, Any] = field(default_factory=dict)


class Layer(Protocol):
    """One layer in one step, for the live rows of canvases of one policy that stand alike; T rows."""

    index: int  # of the layer
    last: bool
    whole: bool  # every row of every canvas is recomputed
    x: torch.Tensor  # [T, E] the residual stream
    h: torch.Tensor  # [T, E] normalised
    columns: Columns
    all: Rows
    forced: Rows  # those of `columns`
    response: Rows  # rows from which the response is read: all that anybody needs behind the last layer
    wanted: Rows  # of a whole step: rows that the head reads, or whose features are kept
    all_keep: bool  # every live row keeps features

    def of(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """These rows of `x` and `h`"""

    def where(self, mask_T: torch.Tensor, rows: Rows) -> Picked:
        """Those of `rows`, which are alive, for which it is true."""

    def least_similar(self, similarity_T: torch.Tensor) -> Rows:
        """The forced rows, and in each canvas as many others as the plan's budget says, the least similar first,
        ties to the lowest row."""

    def similarity(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """Cosine of rows [n, …] over all heads of all ranks, in float32: [n]"""

    def cached_values(self, rows: Rows) -> torch.Tensor:
        """[n, Hkv, D]; of rows whose values are asked for, those before."""

    def features(self, rows: Rows) -> torch.Tensor:
        """[n, W]; of rows that keep none, anything."""

    def keep(self, rows: Rows, features: torch.Tensor) -> None:
        """[n, W]; of rows that keep none, nothing happens."""


# -- flows that policies share -------------------------------------------------------------------


#: (context [n, H * D], output [n, E], ffn [n, E]) -> what the rows keep of them, [n, W]
Kept = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def heads(at: Layer, queried: Rows, renewed: Rows) -> Generator[Ask, Any, tuple[torch.Tensor, ...]]:
    """-> q of some rows, k and v of others; in one product where these are the same"""
    if queried.index is renewed.index:
        return (yield QueryKeyValue(renewed.of(at.h), renewed))
    q = yield Query(queried.of(at.h), queried)
    k, v = yield KeyValue(renewed.of(at.h), renewed)
    return q, k, v


def dense(at: Layer, kept: Kept | None = None) -> Flow:
    """Every row of the canvas through everything; keys and values are this step's own."""
    # Nobody reads the last layer's output but the head and the features: only those rows are queried there.
    rows = at.wanted if at.last else at.all
    q, k, v = yield from heads(at, rows, at.all)
    context = yield Attend(q, rows, k, v)
    output = yield Output(context)
    x, ffn = yield FeedForward(rows.of(at.x), output)
    if kept is not None:
        at.keep(rows, kept(context, output, ffn))
    return rows, x, ffn


def cached(at: Layer) -> Flow:
    """The live rows through everything, over the cached keys and values of the others and their own new ones."""
    q, _, _ = yield QueryKeyValue(at.h, at.all)
    context = yield Attend(q, at.all)
    output = yield Output(context)
    x, ffn = yield FeedForward(at.x, output)
    return at.all, x, ffn
