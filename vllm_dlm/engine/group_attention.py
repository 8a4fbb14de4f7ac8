"""The attention of one group in one layer: over everything, or over what each canvas's selection shows."""

import torch

from vllm_dlm.cache.blocks import KVBlocks
from vllm_dlm.engine.canvas_attention import CanvasAttention
from vllm_dlm.engine.counts import Counts
from vllm_dlm.engine.packing import Group
from vllm_dlm.kernels.delta_attention import delta_attention
from vllm_dlm.kernels.paged_attention import gather, paged_attention
from vllm_dlm.plugins.reuse.flow import Rows


class GroupAttention:
    def __init__(self, layer: int, group: Group, blocks: KVBlocks, scale: float, counts: Counts):
        self.layer, self.group, self.blocks, self.scale, self.counts = layer, group, blocks, scale, counts
        #: the group's responses see only part of their canvas in this layer
        self.selects = bool(group.views) and not group.views[0].sees_all(layer)

    def over_new(self, q: torch.Tensor, rows: Rows, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Queries [n, H, D] over this step's keys and values of every row of their canvas -> [n, H * D]"""
        group = self.group
        # Every row's keys are new: the selections describe their prompts again.
        for view, keys in zip(group.views, k.split(group.all.counts), strict=False):
            view.refresh(self.layer, self.blocks, keys[: view.prompt_len], self.counts)
        if group.filtered and self.selects:
            return self._in_view(q, rows)
        self.counts.attended(rows.counts, group.kv_lens, read=False)
        return CanvasAttention(group, self.scale).over_new(q, rows, k, v)

    def over_blocks(self, q: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Queries [n, H, D] over the cached keys and values of their canvas -> [n, H * D]"""
        if not len(q):
            return q.flatten(1)
        if self.selects:
            return self._in_view(q, rows)
        self.counts.attended(rows.counts, self.group.kv_lens, read=True)
        return CanvasAttention(self.group, self.scale).over_pages(q, rows, self.blocks.layers[self.layer])

    def moved(self, q: torch.Tensor, rows: Rows, changed: Rows, moved: torch.Tensor) -> torch.Tensor:
        """What the moved values [S, Hkv, D] of the changed rows add to each query's context -> [n, H * D]"""
        group, pages = self.group, self.blocks.layers[self.layer]
        if not self.selects:
            self.counts.attended(rows.counts, group.kv_lens, read=True)
            return CanvasAttention(group, self.scale).delta_over_pages(q, rows, pages, changed, moved)
        positions = changed.of(group.positions)
        if changed.mask is not None:
            moved = moved * changed.mask[:, None, None]
        out, voters = torch.empty_like(q), rows.of(group.voters)
        own = zip(self._parts(rows), positions.split(changed.counts), moved.split(changed.counts), strict=True)
        for canvas, ((prompt, response), where, values) in enumerate(own):
            length, table = group.kv_lens[canvas], group.tables[canvas]
            if (count := prompt.stop - prompt.start) > 0:
                self.counts.attended([count], [length], read=True)
                keys = gather(pages, table, length)[0]
                out[prompt] = delta_attention(q[prompt], keys, keys[:, where], values, self.scale)
            out[response] = group.views[canvas].delta(
                self.layer, self.blocks, q[response], voters[response], where, values, self.scale, self.counts
            )
        return out.flatten(1)

    def _in_view(self, q: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Rows of the prompt see everything, those of the response what their canvas's view shows them."""
        group, pages = self.group, self.blocks.layers[self.layer]
        out, voters = torch.empty_like(q), rows.of(group.voters)
        for canvas, (prompt, response) in enumerate(self._parts(rows)):
            length, table = group.kv_lens[canvas], group.tables[canvas]
            if (count := prompt.stop - prompt.start) > 0:
                self.counts.attended([count], [length], read=True)
                out[prompt] = paged_attention(q[prompt], pages, [table], [count], [length], self.scale)
            view = group.views[canvas]
            out[response] = view.attend(self.layer, self.blocks, q[response], voters[response], self.scale, self.counts)
        return out.flatten(1)

    def _parts(self, rows: Rows) -> list[tuple[slice, slice]]:
        """Where each canvas's queries lie, prompt and response apart."""
        group = self.group
        if any(group.prompt_rows):
            canvas = rows.of(group.canvas)
            starts = torch.tensor(group.response_starts, device=canvas.device)
            before = rows.of(group.positions) < starts[canvas]
            prompts = torch.bincount(canvas[before], minlength=len(rows.counts)).tolist()
        else:
            prompts = [0] * len(rows.counts)
        parts, start = [], 0
        for count, prompt in zip(rows.counts, prompts, strict=True):
            parts.append((slice(start, start + prompt), slice(start + prompt, start + count)))
            start += count
        return parts
