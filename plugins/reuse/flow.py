"""What the flow of a layer is written with: asks, rows, and what a layer shows.

A policy writes one transformer layer as a generator. It yields what it wants
computed and is sent the result. n rows; H and Hkv heads of D numbers each:

    v = yield Value(h)                      # [n, Hkv, D]
    q = yield Query(h, rope)                # [n, H, D], rotated
    k = yield Key(h, rope)                  # [n, Hkv, D], rotated
    context = yield Attend(q, rows)         # [n, H * D]
    output = yield Output(context)          # [n, E]
    ffn = yield FeedForward(x)              # [n, E]
    return rows, x + ffn

The engine drives the flows of all policies of a batch in lockstep: asks of one
type become one product, the earliest type in this order first, so rows of
different policies share it and no policy knows of another. What is returned is
the residual stream behind the layer: of all live rows, or, in the last layer,
of those that the flow names.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch


class Rope(NamedTuple):
    """Cosines and sines of rows, [n, 1, D / 2] each."""

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True)
class Rows:
    """Some of the live rows, ascending, canvas after canvas."""

    index: torch.Tensor | None  # [n] into the live rows; None: all of them
    counts: list[int]  # how many of each canvas

    def __len__(self) -> int:
        return sum(self.counts)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """These rows of a tensor of all live rows; without a copy where all are meant."""
        return tensor if self.index is None else tensor[self.index]

    def turned(self, rope: Rope) -> Rope:
        """The rotation of these rows."""
        return rope if self.index is None else Rope(rope.cos[self.index], rope.sin[self.index])

    def set(self, tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """A tensor of all live rows with other values in these."""
        return values if self.index is None else tensor.index_copy(0, self.index, values)

    def places(self, some: "Rows") -> torch.Tensor | slice:
        """Where `some` of these rows stand among them."""
        if some.index is None:
            return slice(None)
        return some.index if self.index is None else torch.searchsorted(self.index, some.index)


# -- asks, in the order of a layer ---------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """Of rows, each for itself."""

    inputs: torch.Tensor  # [n, …]
    rope: Rope | None = None  # of what is rotated


class Value(Projection):
    """inputs [n, E]: normalised"""


class Query(Projection):
    """inputs [n, E]: normalised"""


class Key(Projection):
    """inputs [n, E]: normalised"""


@dataclass(frozen=True)
class AttendMoved:
    """What the moved values of changed rows add to the contexts of queries."""

    q: torch.Tensor  # [n, H, D]
    rows: Rows  # [n] whose queries these are
    changed: Rows  # [S]
    moved: torch.Tensor  # [S, Hkv, D]


@dataclass(frozen=True)
class Attend:
    """Contexts over the keys and values of the row's canvas: those in the cache, or new ones of every row."""

    q: torch.Tensor  # [n, H, D]
    rows: Rows  # [n] whose queries these are
    k: torch.Tensor | None = None  # [T, Hkv, D]
    v: torch.Tensor | None = None  # [T, Hkv, D]


class Output(Projection):
    """inputs [n, H * D]: contexts"""


class FeedForward(Projection):
    """inputs [n, E]: the residual stream, not normalised"""


Ask = Projection | AttendMoved | Attend
ORDER: tuple[type, ...] = (Value, Query, Key, AttendMoved, Attend, Output, FeedForward)
Flow = Generator[Ask, torch.Tensor, tuple[Rows, torch.Tensor]]


# -- what a flow sees ----------------------------------------------------------------------------


@dataclass
class Columns:
    """What is known of each live row before the first layer; T rows."""

    forced: torch.Tensor  # [T] bool: recomputed anyway, by the plan or because their token just changed
    changed: torch.Tensor  # [T] bool: their token just changed
    fresh: torch.Tensor  # [T] bool: the keys they may see change in this step
    response: torch.Tensor  # [T] bool: rows from which the response is read
    #: what a flow hands to the next layer
    carried: dict[str, Any] = field(default_factory=dict)


class Layer(Protocol):
    """One layer in one step, for the live rows of canvases of one policy that stand alike; T rows."""

    index: int  # of the layer
    last: bool
    whole: bool  # every row of every canvas is recomputed
    x: torch.Tensor  # [T, E] the residual stream
    h: torch.Tensor  # [T, E] normalised
    rope: Rope
    columns: Columns
    all: Rows
    forced: Rows  # those of `columns`
    response: Rows  # rows from which the response is read: all that anybody needs behind the last layer
    wanted: Rows  # of a whole step: rows that the head reads, or whose features are kept

    def where(self, mask_T: torch.Tensor) -> Rows:
        """The rows for which it is true. (How many, the host has to wait for.)"""

    def least_similar(self, similarity_T: torch.Tensor) -> Rows:
        """The forced rows, and in each canvas as many others as the plan's budget says, the least similar first,
        ties to the lowest row. (How many, the host knows.)"""

    def similarity(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """Cosine of rows [n, …] over all heads of all ranks, in float32: [n]"""

    def cached_values(self, rows: Rows) -> torch.Tensor:
        """[n, Hkv, D]"""

    def store_values(self, rows: Rows, v: torch.Tensor) -> None: ...

    def store_keys(self, rows: Rows, k: torch.Tensor) -> None: ...

    def features(self, rows: Rows) -> torch.Tensor:
        """[n, W]; of rows that keep none, anything."""

    def keep(self, rows: Rows, features: torch.Tensor) -> None:
        """[n, W]; of rows that keep none, nothing happens."""


# -- flows that policies share -------------------------------------------------------------------


#: (context [n, H * D], output [n, E], ffn [n, E]) -> what the rows keep of them, [n, W]
Kept = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def dense(at: Layer, kept: Kept | None = None) -> Flow:
    """Every row of the canvas through everything; keys and values are this step's own."""
    # Nobody reads the last layer's output but the head and the features: only those rows are queried there.
    rows = at.wanted if at.last else at.all
    v = yield Value(at.h)
    q = yield Query(rows.of(at.h), rows.turned(at.rope))
    k = yield Key(at.h, at.rope)
    at.store_values(at.all, v)
    at.store_keys(at.all, k)
    context = yield Attend(q, rows, k, v)
    output = yield Output(context)
    x = rows.of(at.x) + output
    ffn = yield FeedForward(x)
    if kept is not None:
        at.keep(rows, kept(context, output, ffn))
    return rows, x + ffn


def cached(at: Layer) -> Flow:
    """The live rows through everything, over the cached keys and values of the others and their own new ones."""
    v = yield Value(at.h)
    q = yield Query(at.h, at.rope)
    k = yield Key(at.h, at.rope)
    at.store_values(at.all, v)
    at.store_keys(at.all, k)
    context = yield Attend(q, at.all)
    output = yield Output(context)
    x = at.x + output
    ffn = yield FeedForward(x)
    return at.all, x + ffn
