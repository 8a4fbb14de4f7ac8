"""Drives the flows of one transformer layer, over packed rows of several policies.

A flow (see plugins/reuse/flow.py) asks for what it wants computed. The flows
of a batch advance in lockstep, and asks of one type are joined into one
product, whoever they come from.
"""

import torch
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce

from vllm_dlm.cache.blocks import KVBlocks
from vllm_dlm.engine.counts import Counts
from vllm_dlm.engine.group_attention import GroupAttention
from vllm_dlm.engine.packing import Group
from vllm_dlm.plugins.reuse.flow import (
    ORDER,
    Ask,
    Attend,
    AttendMoved,
    FeedForward,
    Key,
    Output,
    Query,
    Rope,
    Rows,
    Value,
)

#: what a step counts of each projection
COUNTED = {Value: "value", Query: "query", Key: "key", Output: "output", FeedForward: "feed_forward"}


class LayerStep:
    """One layer in one step."""

    def __init__(self, index: int, last: bool, layer, blocks: KVBlocks | None, counts: Counts):
        self.index, self.last, self.layer, self.blocks, self.counts = index, last, layer, blocks, counts

    def run(self, groups: list[Group], x_TE: torch.Tensor, rope: Rope) -> list[tuple[Rows, torch.Tensor]]:
        """-> what each group's flow returns: rows, and their residual stream behind this layer"""
        h_TE = self.layer.input_layernorm(x_TE)
        flows = [group.reuse.layer(GroupLayer(self, group, x_TE, h_TE, rope)) for group in groups]
        asks: dict[int, Ask] = {}  # what each flow waits for
        done: dict[int, tuple[Rows, torch.Tensor]] = {}

        def advance(number: int, result: torch.Tensor | None) -> None:
            try:
                asks[number] = flows[number].send(result)
            except StopIteration as end:
                asks.pop(number, None)
                done[number] = end.value

        for number in range(len(flows)):
            advance(number, None)
        while asks:
            kind = min({type(ask) for ask in asks.values()}, key=self._place)
            together = {number: ask for number, ask in asks.items() if type(ask) is kind}
            for number, result in zip(together, self._answers(kind, together, groups), strict=True):
                advance(number, result)
        return [self._checked(group, *done[number]) for number, group in enumerate(groups)]

    def _checked(self, group: Group, rows: Rows, x: torch.Tensor) -> tuple[Rows, torch.Tensor]:
        if len(x) != len(rows) or (not self.last and rows.index is not None):
            raise ValueError(
                f"{group.reuse.name}: the flow of layer {self.index} returned {len(x)} rows as {len(rows)} of "
                f"{len(group.all)}; all but the last layer return every live row"
            )
        return rows, x

    @staticmethod
    def _place(kind: type) -> int:
        if kind not in ORDER:
            known = ", ".join(ask.__name__ for ask in ORDER)
            raise TypeError(f"a flow yields asks ({known}), not {kind.__name__}")
        return ORDER.index(kind)

    # -- answers ---------------------------------------------------------------------------

    def _answers(self, kind: type, asks: dict[int, Ask], groups: list[Group]) -> list[torch.Tensor]:
        if kind in (Attend, AttendMoved):
            return [self._attended(groups[number], ask) for number, ask in asks.items()]
        inputs = [rows_of(ask) for ask in asks.values()]
        sizes = [len(own) for own in inputs]
        self.counts.projected(COUNTED[kind], sum(sizes))
        if not any(sizes):  # not every linear kernel takes an empty product
            (ask, *_) = asks.values()
            return [self._product(kind, inputs[0].new_zeros(1, inputs[0].shape[1]), no_rotation(ask))[:0]] * len(asks)
        rows = torch.cat(inputs) if len(inputs) > 1 else inputs[0]
        result = self._product(kind, rows, joined_rope(list(asks.values())))
        return list(result.split(sizes)) if len(inputs) > 1 else [result]

    def _product(self, kind: type, rows: torch.Tensor, rope: Rope | None) -> torch.Tensor:
        layer = self.layer
        if kind is Value:
            return layer.value(rows)
        if kind is Query:
            return layer.query(rows, rope)
        if kind is Key:
            return layer.key(rows, rope)
        return layer.attention_output(rows) if kind is Output else layer.feed_forward(rows)

    def _attended(self, group: Group, ask: Ask) -> torch.Tensor:
        attention = GroupAttention(self.index, group, self.blocks, self.layer.head_dim**-0.5, self.counts)
        if isinstance(ask, AttendMoved):
            return attention.moved(ask.q, ask.rows, ask.changed, ask.moved)
        if ask.k is None:
            return attention.over_blocks(ask.q, ask.rows)
        return attention.over_new(ask.q, ask.rows, ask.k, ask.v)


def rows_of(ask: Ask) -> torch.Tensor:
    if isinstance(ask, Output):
        return ask.context
    return ask.x if isinstance(ask, FeedForward) else ask.hidden


def joined_rope(asks: list[Ask]) -> Rope | None:
    if not isinstance(asks[0], Query | Key):
        return None
    if len(asks) == 1:
        return asks[0].rope
    return Rope(*(torch.cat(parts) for parts in zip(*(ask.rope for ask in asks), strict=True)))


def no_rotation(ask: Ask) -> Rope | None:
    """Of one row."""
    if not isinstance(ask, Query | Key):
        return None
    return Rope(*(part.new_zeros(1, *part.shape[1:]) for part in ask.rope))


class GroupLayer:
    """What a flow sees of one layer: see `Layer` in plugins/reuse/flow.py."""

    def __init__(self, step: LayerStep, group: Group, x_TE: torch.Tensor, h_TE: torch.Tensor, rope: Rope):
        self.index, self.last = step.index, step.last
        self.x, self.h = x_TE[group.span], h_TE[group.span]
        self.rope = Rope(rope.cos[group.span], rope.sin[group.span])
        self.whole, self.columns = group.whole, group.columns
        self.all, self.forced, self.response, self.wanted = group.all, group.forced, group.response, group.wanted
        self.where, self.least_similar = group.where, group.least_similar
        self._group, self._blocks = group, step.blocks

    def similarity(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        new, old = new.flatten(1).float(), old.flatten(1).float()
        parts = torch.stack([(new * old).sum(-1), new.square().sum(-1), old.square().sum(-1)])
        if get_tensor_model_parallel_world_size() > 1:
            parts = tensor_model_parallel_all_reduce(parts)
        product, a, b = parts
        return product / (a.sqrt().clamp_min(1e-8) * b.sqrt().clamp_min(1e-8))

    def cached_values(self, rows: Rows) -> torch.Tensor:
        return self._blocks.read_values(self.index, self._slots(rows))

    def store_values(self, rows: Rows, v: torch.Tensor) -> None:
        if self._group.tables:
            self._blocks.write_values(self.index, self._slots(rows), v)

    def store_keys(self, rows: Rows, k: torch.Tensor) -> None:
        if self._group.tables:
            self._blocks.write_keys(self.index, self._slots(rows), k)

    def _slots(self, rows: Rows):
        return self._group.slots if rows.index is None else self._group.slots[rows.index]

    def features(self, rows: Rows) -> torch.Tensor:
        return self._blocks.read_features(self.index, self._feature_slots(rows), self._group.feature_width)

    def keep(self, rows: Rows, features: torch.Tensor) -> None:
        self._blocks.write_features(self.index, self._feature_slots(rows), features)

    def _feature_slots(self, rows: Rows):
        return self._group.feature_slots if rows.index is None else self._group.feature_slots[rows.index]
