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
    Projection,
    Query,
    Rope,
    Rows,
    Value,
)

#: what a step counts of each projection
COUNTED: dict[type, str] = {Value: "value", Query: "query", Key: "key", Output: "output", FeedForward: "feed_forward"}


class LayerStep:
    """One layer in one step."""

    def __init__(self, index: int, last: bool, layer, blocks: KVBlocks, counts: Counts):
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
        projections = [ask for ask in asks.values() if isinstance(ask, Projection)]
        if not projections:
            return [self._attended(groups[number], ask) for number, ask in asks.items()]
        sizes = [len(ask.inputs) for ask in projections]
        self.counts.projected(COUNTED[kind], sum(sizes))
        if not any(sizes):  # not every linear kernel takes an empty product
            return [self._product(kind, one_row(projections[0]))[:0]] * len(asks)
        if len(projections) == 1:
            return [self._product(kind, projections[0])]
        return list(self._product(kind, joined(projections)).split(sizes))

    def _product(self, kind: type, asked: Projection) -> torch.Tensor:
        layer = self.layer
        if kind is Value:
            return layer.value(asked.inputs)
        if kind is Query:
            return layer.query(asked.inputs, asked.rope)
        if kind is Key:
            return layer.key(asked.inputs, asked.rope)
        return layer.attention_output(asked.inputs) if kind is Output else layer.feed_forward(asked.inputs)

    def _attended(self, group: Group, ask: Ask) -> torch.Tensor:
        attention = GroupAttention(self.index, group, self.blocks, self.layer.head_dim**-0.5, self.counts)
        if isinstance(ask, AttendMoved):
            return attention.moved(ask.q, ask.rows, ask.changed, ask.moved)
        assert isinstance(ask, Attend)
        if ask.k is None or ask.v is None:
            return attention.over_blocks(ask.q, ask.rows)
        return attention.over_new(ask.q, ask.rows, ask.k, ask.v)


def joined(asks: list[Projection]) -> Projection:
    ropes = [ask.rope for ask in asks if ask.rope is not None]
    rope = Rope(*(torch.cat(parts) for parts in zip(*ropes, strict=True))) if ropes else None
    return Projection(torch.cat([ask.inputs for ask in asks]), rope)


def one_row(ask: Projection) -> Projection:
    """Of zeros, of the same kind."""
    rope = None if ask.rope is None else Rope(*(part.new_zeros(1, *part.shape[1:]) for part in ask.rope))
    return Projection(ask.inputs.new_zeros(1, ask.inputs.shape[1]), rope)


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
