"""Full attention inside each canvas of a group, by the fastest kernel the device has."""

import torch

from vllm_dlm.engine.flash_attention import flash_attention, has_flash
from vllm_dlm.engine.group import Group
from vllm_dlm.kernels.delta_attention import delta_attention, delta_over_pages
from vllm_dlm.kernels.paged_attention import gather, paged_attention
from vllm_dlm.kernels.varlen_attention import varlen_attention
from vllm_dlm.plugins.reuse.flow import Rows


class CanvasAttention:
    """Queries of a group's rows, over all keys of their canvases."""

    def __init__(self, group: Group, scale: float):
        self.group, self.scale = group, scale

    def over_new(self, q: torch.Tensor, rows: Rows, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [n, H, D]; k and v [T, Hkv, D] of every row of the canvases -> context [n, H * D]"""
        group = self.group
        if has_flash(q):
            ends = group.kv_ends[0]
            context = flash_attention(q, k, v, starts(rows, q), ends, None, None, group.max_q, group.max_kv, self.scale)
        else:
            context = varlen_attention(q, k, v, rows.counts, group.kv_lens, self.scale)
        return context.flatten(1)

    def over_pages(self, q: torch.Tensor, rows: Rows, pages: torch.Tensor) -> torch.Tensor:
        """q [n, H, D] over the cached keys of each canvas -> context [n, H * D]"""
        group = self.group
        if has_flash(q):
            keys, values = pages.transpose(1, 2).chunk(2, -1)  # [blocks, block_size, Hkv, D]
            context = flash_attention(
                q, keys, values, starts(rows, q), None, group.kv_ends[1, :-1], group.table, group.max_q,
                group.max_kv, self.scale,
            )  # fmt: skip
        else:
            context = paged_attention(q, pages, group.tables, rows.counts, group.kv_lens, self.scale)
        return context.flatten(1)

    def delta_over_pages(
        self, q: torch.Tensor, rows: Rows, pages: torch.Tensor, changed: Rows, moved: torch.Tensor
    ) -> torch.Tensor:
        """What the `moved` values [S, Hkv, D] of the changed rows add to each query's context -> [n, H * D]"""
        group = self.group
        if changed.mask is not None:
            moved = moved * changed.mask[:, None, None]
        if by_tables(q):
            added = delta_over_pages(
                q, starts(rows, q), pages, group.table, group.kv_ends[1, :-1], self.places(changed), moved, self.scale,
                group.max_q, group.max_kv,
            )  # fmt: skip
            return added.flatten(1)
        positions = changed.of(group.row_places)
        parts = zip(
            q.split(rows.counts), group.tables, group.kv_lens, positions.split(changed.counts),
            moved.split(changed.counts), strict=True,
        )  # fmt: skip
        added = []
        for query, table, length, where, values in parts:
            keys = gather(pages, table, length)[0]
            added.append(delta_attention(query, keys, keys[:, where], values, self.scale))
        return torch.cat(added).flatten(1)

    def places(self, changed: Rows) -> torch.Tensor:
        """[C, longest canvas] int32: which of the changed rows a position is, -1: none"""
        group = self.group
        if changed.index is None and group.places is not None:
            return group.places  # live rows stay where they are for all layers
        places = torch.full((len(group.kv_lens), group.max_kv), -1, dtype=torch.int32, device=group.canvas.device)
        number = torch.arange(len(changed), dtype=torch.int32, device=places.device)
        places[changed.of(group.canvas), changed.of(group.row_places)] = number
        if changed.index is None:
            group.places = places
        return places


def by_tables(q: torch.Tensor) -> bool:
    """Lengths and tables are read where they lie, on the device; else the host goes through lists of them."""
    return q.is_cuda


def starts(rows: Rows, q: torch.Tensor) -> torch.Tensor:
    """[C + 1] int32"""
    if rows.starts is not None:
        return rows.starts
    return torch.tensor([0, *rows.counts], device=q.device).cumsum(0, dtype=torch.int32)
