"""The attention of one group in one layer: over everything, or over what each canvas's selection shows."""

import torch

from vllm_dlm.cache.blocks import KVBlocks
from vllm_dlm.engine.canvas_attention import CanvasAttention, starts
from vllm_dlm.engine.counts import Counts
from vllm_dlm.engine.group import Group
from vllm_dlm.kernels.shadow_attention import shadow_attention
from vllm_dlm.plugins.reuse.flow import Rows


class GroupAttention:
    def __init__(self, layer: int, group: Group, blocks: KVBlocks, scale: float, counts: Counts):
        self.layer, self.group, self.blocks, self.scale, self.counts = layer, group, blocks, scale, counts
        #: the group's responses see only part of their canvas in this layer
        self.selects = group.selecting is not None and not group.selecting.sees_all(layer)

    def over_new(self, q: torch.Tensor, rows: Rows, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Queries [n, H, D] over this step's keys and values of every row of their canvas -> [n, H * D]"""
        group = self.group
        if group.hidden_row is not None:
            return self._of_shadow(q, rows, k, v, group.hidden_row)
        if group.selecting is not None:  # every row's keys are new: the prompts are described again
            group.selecting.refresh(self.layer, self.blocks, k, self.counts)
        if group.filtered and self.selects:
            return self._in_view(q, rows)
        self.counts.attended(rows.counts, group.kv_lens, read=False)
        return CanvasAttention(group, self.scale).over_new(q, rows, k, v)

    def _of_shadow(self, q: torch.Tensor, rows: Rows, k: torch.Tensor, v: torch.Tensor, hidden: int) -> torch.Tensor:
        """Shadow rows over what their canvas has in its blocks by now, and over each other"""
        group = self.group
        self.counts.attended(rows.counts, group.kv_lens, read=True)
        context = shadow_attention(
            q, starts(rows, q), rows.of(group.row_places) + hidden, k, v, starts(group.all, q),
            self.blocks.layers[self.layer], group.table, group.kv_ends[1, :-1], self.scale, group.max_q,
        )  # fmt: skip
        return context.flatten(1)

    def over_blocks(self, q: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Queries [n, H, D] over the cached keys and values of their canvas -> [n, H * D]"""
        if not len(q):
            return q.flatten(1)
        if self.selects:
            assert self.group.selecting is not None
            self.group.selecting.describe_final(self.layer, self.blocks, self.counts)
            return self._in_view(q, rows)
        self.counts.attended(rows.counts, self.group.kv_lens, read=True)
        return CanvasAttention(self.group, self.scale).over_pages(q, rows, self.blocks.layers[self.layer])

    def moved(self, q: torch.Tensor, rows: Rows, changed: Rows, moved: torch.Tensor) -> torch.Tensor:
        """What the moved values [S, Hkv, D] of the changed rows add to each query's context -> [n, H * D]"""
        group, pages, selecting = self.group, self.blocks.layers[self.layer], self.group.selecting
        if selecting is None or not self.selects:
            self.counts.attended(rows.counts, group.kv_lens, read=True)
            return CanvasAttention(group, self.scale).delta_over_pages(q, rows, pages, changed, moved)
        out, over = None, CanvasAttention(group, self.scale)
        if any(read := selecting.prompts_of(rows)):
            self.counts.attended(read, group.kv_lens, read=True)
            out = over.delta_over_pages(q, rows, pages, changed, moved).view_as(q)
        if changed.mask is not None:
            moved = moved * changed.mask[:, None, None]
        return selecting.delta(
            self.layer, self.blocks, q, rows, group.voters, self.scale, self.counts, moved, over.places(changed), out
        ).flatten(1)

    def _in_view(self, q: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Rows of the response see what their canvas's view shows them, those of the prompt everything. Where any of
        the latter live, all rows are attended to as such first: their number is known, not always which they are."""
        group, selecting, out = self.group, self.group.selecting, None
        assert selecting is not None
        if any(read := selecting.prompts_of(rows)):
            self.counts.attended(read, group.kv_lens, read=True)
            out = CanvasAttention(group, self.scale).over_pages(q, rows, self.blocks.layers[self.layer]).view_as(q)
        return selecting.attend(
            self.layer, self.blocks, q, rows, group.voters, self.scale, self.counts, out
        ).flatten(1)  # fmt: skip
