"""Drives the flows of one transformer layer over packed rows of several policies.

A flow (see plugins/reuse/flow.py) yields asks, each for one computation. The flows of a batch advance in lockstep, and
asks of one type become one product across policies.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from vllm_dlm.cache.blocks import KVBlocks, Slots
from vllm_dlm.kernels.rotary_write import rotary_write
from vllm_dlm.plugins.reuse.flow import (
    ORDER,
    Ask,
    Attend,
    AttendMoved,
    FeedForward,
    Heads,
    Key,
    KeyValue,
    LayerResult,
    Output,
    Query,
    QueryKey,
    QueryKeyValue,
    Rows,
    Value,
)
from vllm_dlm.step.attention import GroupAttention
from vllm_dlm.step.batch import Batch, Group
from vllm_dlm.step.counts import Counts

if TYPE_CHECKING:
    from vllm_dlm.models.transformer import Normed

#: projections of an ask, and their names in the counts
PARTS: dict[type, str] = {Value: "v", QueryKeyValue: "qkv", KeyValue: "kv", QueryKey: "qk", Query: "q", Key: "k"}
COUNTED = {"q": "query", "k": "key", "v": "value"}


class LayerObserver(Protocol):
    """Observer of the layers of one forward. Groups are identified by their index in `Batch.groups`."""

    def asked(self, asks: dict[int, Ask]) -> None:
        """Called with the asks of these groups, all of one type, before they are answered."""

    def attention_counts(self, group: int, counts: Counts) -> Counts:
        """-> object that counts the group's next attention instead of `counts`"""

    def attended(self, group: int, layer: int, counts: Counts) -> None:
        """Called after the attention of a group, which is counted in `counts`."""


class DividedRows(NamedTuple):
    """A tensor of rows, and its parts that were sent to flows"""

    whole: torch.Tensor
    parts: Sequence[torch.Tensor]

    def rejoined(self, some: list[torch.Tensor]) -> torch.Tensor | None:
        """These parts as one tensor without a copy; None: they are not adjacent parts of this tensor"""
        first = next((index for index, part in enumerate(self.parts) if part is some[0]), len(self.parts))
        same = self.parts[first : first + len(some)]
        if len(same) < len(some) or any(a is not b for a, b in zip(same, some, strict=True)):
            return None
        start = sum(map(len, self.parts[:first]))
        return self.whole[start : start + sum(map(len, some))]


class LayerStep:
    """Runs the layers of one forward."""

    def __init__(self, batch: Batch, table: torch.Tensor, layers: Sequence, blocks: KVBlocks, counts: Counts):
        self.batch, self.layers, self.blocks, self.counts = batch, layers, blocks, counts
        self.table = table  # [positions, D] rotary embedding
        self.observer = batch.observer
        self.parts = [GroupLayer(batch, blocks, group) for group in batch.groups]
        self.divided: list[DividedRows] = []  # tensors of this layer

    def run(self, index: int, normed: "Normed") -> list[LayerResult]:
        """-> result of each group's flow, in the order of the groups"""
        self.layer, self.index, self.last = self.layers[index], index, index == len(self.layers) - 1
        self.divided.clear()
        for part in self.parts:
            part.enter(self.layer, self.index, self.last, normed)
        if len(self.parts) > 1:
            h, x = normed
            self.divided += [
                DividedRows(h, [part.h for part in self.parts]),
                DividedRows(x, [part.x for part in self.parts]),
            ]
        flows = [part.group.reuse.layer(part) for part in self.parts]
        asks: dict[int, Ask] = {}  # pending ask of each flow
        done: dict[int, LayerResult] = {}

        def advance(number: int, result: Any) -> None:
            try:
                asks[number] = flows[number].send(result)
            except StopIteration as end:
                asks.pop(number, None)
                done[number] = end.value

        for number in range(len(flows)):
            advance(number, None)
        while asks:
            kinds = {type(ask) for ask in asks.values()}
            kind = min(kinds, key=self._place) if len(kinds) > 1 else kinds.pop()
            together = {number: ask for number, ask in asks.items() if type(ask) is kind}
            for number, result in zip(together, self._answers(kind, together), strict=True):
                advance(number, result)
        return [self._checked(part.group, *done[number]) for number, part in enumerate(self.parts)]

    def joined(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """One tensor of all rows, without a copy if flows returned the parts unchanged"""
        if len(parts) == 1:
            return parts[0]
        for divided in self.divided:
            if (whole := divided.rejoined(parts)) is not None:
                return whole
        return torch.cat(parts)

    def _divide(self, whole: torch.Tensor, like: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        if len(like) == 1:
            return (whole,)
        parts = whole.split([len(part) for part in like])
        self.divided.append(DividedRows(whole, parts))
        return parts

    def _checked(self, group: Group, rows: Rows, x: torch.Tensor, ffn: torch.Tensor) -> LayerResult:
        if not len(x) == len(ffn) == len(rows) or (not self.last and rows.index is not None):
            raise ValueError(
                f"{group.reuse.name}: the flow of layer {self.index} returned {len(x)} rows as {len(rows)} of "
                f"{len(group.all)}; every layer except the last one must return all live rows"
            )
        return rows, x, ffn

    @staticmethod
    def _place(kind: type) -> int:
        if kind not in ORDER:
            known = ", ".join(ask.__name__ for ask in ORDER)
            raise TypeError(f"a flow yields asks ({known}), not {kind.__name__}")
        return ORDER.index(kind)

    # -- answers ---------------------------------------------------------------------------

    def _answers(self, kind: type, asks: dict[int, Any]) -> Sequence:
        if self.observer is not None:
            self.observer.asked(asks)
        groups = [self.parts[number].group for number in asks]
        if kind in PARTS:
            return self._heads(PARTS[kind], list(asks.values()), groups)
        if kind is Output:
            return self._outputs([ask.context for ask in asks.values()])
        if kind is FeedForward:
            return self._feed_forward(list(asks.values()))
        self._place(kind)
        return [self._attended(number, ask) for number, ask in asks.items()]

    def _heads(self, names: str, asks: list[Heads], groups: list[Group]) -> list:
        """`names`: the projections among q, k and v, in this order"""
        inputs = self.joined([ask.inputs for ask in asks])
        sizes = [len(ask.inputs) for ask in asks]
        for name in names:
            self.counts.projected(COUNTED[name], len(inputs))
        padded = inputs if len(inputs) else inputs.new_zeros(1, inputs.shape[1])
        # Some products do not support empty inputs.
        made = dict(zip(names, self.layer.heads(names, padded), strict=True))
        if not len(inputs):
            made = {name: x[:0] for name, x in made.items()}
        else:
            made |= self._rotated_and_kept(made, asks, groups)
        if len(asks) == 1:
            return [tuple(made.values()) if len(made) > 1 else made[names]]
        parts = zip(*(x.split(sizes) for x in made.values()), strict=True)
        return [part if len(made) > 1 else part[0] for part in parts]

    def _rotated_and_kept(self, made: dict[str, torch.Tensor], asks: list[Heads], groups: list[Group]) -> dict:
        """-> rotated queries and keys. Writes new keys and values to the cache."""
        q, k, v = (made.get(name) for name in "qkv")
        keeps = (k is not None or v is not None) and any(group.cached for group in groups)
        if q is None and k is None and not keeps:
            return {}
        positions, slots, index = self._whose([ask.rows for ask in asks], groups)
        cache = self.blocks.caches[self.index] if keeps else None
        q, k = rotary_write(q, k, v, self.table, positions, slots.block, slots.offset, cache, index)
        return {name: x for name, x in (("q", q), ("k", k)) if x is not None}

    def _whose(self, rows: list[Rows], groups: list[Group]) -> tuple[torch.Tensor, Slots, torch.Tensor | None]:
        """-> positions, slots, and the index of the asks' rows within these; None: all"""
        batch, spans = self.batch, [group.span for group in groups]
        masked = any(own.mask is not None for own in rows)
        adjoin = all(a.stop == b.start for a, b in pairwise(spans))
        if not masked and (len(rows) == 1 or (adjoin and all(own.index is None for own in rows))):
            span = slice(spans[0].start, spans[-1].stop)
            return batch.positions[span], batch.slots[span], rows[0].index
        positions, blocks, offsets = [], [], []
        for own, span in zip(rows, spans, strict=True):
            slots = batch.slots[span]
            block = own.gather(slots.block)
            positions.append(own.gather(batch.positions[span]))
            # Unselected rows write nothing.
            blocks.append(block if own.mask is None else torch.where(own.mask, block, batch.nowhere))
            offsets.append(own.gather(slots.offset))
        return concatenated(positions), Slots(concatenated(blocks), concatenated(offsets)), None

    def _outputs(self, contexts: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        joined = concatenated(contexts)
        self.counts.projected("output", len(joined))
        return self._divide(product(self.layer.attention_output, joined), contexts)

    def _feed_forward(self, asks: list[FeedForward]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        residual = [ask.x for ask in asks]
        # The same kernel for every batch, because a norm without the sum rounds differently.
        added = [torch.zeros_like(ask.x) if ask.output is None else ask.output for ask in asks]
        h, x = self.layer.add_and_norm(self.joined(residual), self.joined(added))
        xs, hs = self._divide(x, residual), self._divide(h, residual)
        passed = [h if ask.picked is None else ask.picked.gather(h) for ask, h in zip(asks, hs, strict=True)]
        joined = self.joined(passed)
        self.counts.projected("feed_forward", len(joined))
        return list(zip(xs, self._divide(product(self.layer.feed_forward, joined), passed), strict=True))

    def _attended(self, number: int, ask: Ask) -> torch.Tensor:
        if self.observer is None:
            return self._attention(number, ask, self.counts)
        counts = self.observer.attention_counts(number, self.counts)
        context = self._attention(number, ask, counts)
        self.observer.attended(number, self.index, counts)
        return context

    def _attention(self, number: int, ask: Ask, counts: Counts) -> torch.Tensor:
        group = self.parts[number].group
        attention = GroupAttention(self.index, group, self.blocks, self.layer.head_dim**-0.5, counts)
        if isinstance(ask, AttendMoved):
            return attention.moved(ask.q, ask.rows, ask.changed, ask.moved, ask.unused)
        assert isinstance(ask, Attend)
        if ask.k is None or ask.v is None:
            return attention.over_blocks(ask.q, ask.rows)
        return attention.over_new(ask.q, ask.rows, ask.k, ask.v)


def product(function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """`function(rows)`, also for empty rows, which some linear kernels do not support"""
    return function(rows) if len(rows) else function(rows.new_zeros(1, rows.shape[1]))[:0]


def concatenated(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class GroupLayer:
    """Implements `Layer` of plugins/reuse/flow.py, the interface of a layer for flows."""

    def __init__(self, batch: Batch, blocks: KVBlocks, group: Group):
        # No reference to the step: a reference cycle would keep its tensors alive until garbage collection.
        self.blocks, self.group = blocks, group
        self.whole, self.columns = group.whole, group.columns
        self.all, self.forced, self.response, self.wanted = group.all, group.forced, group.response, group.wanted
        self.all_keep = group.all_keep
        self.where, self.least_similar = group.where, group.least_similar
        self._slots = batch.slots[group.span] if group.cached else None

    def enter(self, layer: Any, index: int, last: bool, normed: "Normed") -> None:
        self._layer, self.index, self.last, span = layer, index, last, self.group.span
        if isinstance(normed, torch.Tensor):
            self._normed = normed[:, span]
            self.h, self.x = self._normed.unbind(0)
        else:
            self._normed = None
            self.h, self.x = (part[span] for part in normed)

    def inputs(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        if self._normed is None or rows.index is None:
            return rows.gather(self.x), rows.gather(self.h)
        h, x = self._normed[:, rows.index].unbind(0)
        return x, h

    def similarity(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        return self._layer.similarity(new.flatten(1), old.flatten(1))

    def cached_values(self, rows: Rows) -> torch.Tensor:
        assert self._slots is not None, "only canvases with KV blocks have cached values"
        return self.blocks.read_values(self.index, self._slots, rows)

    def features(self, rows: Rows) -> torch.Tensor:
        group = self.group
        return self.blocks.read_features(self.index, group.feature_slots, rows, group.feature_width)

    def keep(self, rows: Rows, features: torch.Tensor) -> None:
        self.blocks.write_features(self.index, self.group.feature_slots, rows, features)
