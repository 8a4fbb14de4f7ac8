"""Attention: FlashAttention of vLLM, over all keys of each canvas, and over what a group's selection leaves.

FlashAttention is one operator of PyTorch's over packed queries that attend to every key. Its definition is that of
kernels/varlen_attention, over keys that are packed or in pages. Read in vLLM 0.32 and 0.33:
vllm_flash_attn/flash_attn_interface.py, v1/attention/backends/fa_utils.py.
"""

import functools
from typing import Any

import torch

from vllm_dlm.cache.blocks import KVBlocks
from vllm_dlm.kernels.delta_attention import delta_over_pages
from vllm_dlm.kernels.draft_attention import draft_attention
from vllm_dlm.kernels.paged_attention import paged_attention
from vllm_dlm.kernels.shadow_attention import shadow_attention
from vllm_dlm.kernels.varlen_attention import varlen_attention
from vllm_dlm.plugins.reuse.flow import PickedRows, Rows
from vllm_dlm.step.batch import Group
from vllm_dlm.step.counts import Counts
from vllm_dlm.step.packed import PackedCanvases
from vllm_dlm.step.selection import ResponseQueries

_LIBRARY = torch.library.Library("vllm_dlm", "FRAGMENT")
_LIBRARY.define(
    "flash_attention(Tensor q, Tensor k, Tensor v, Tensor q_starts, Tensor? k_starts, Tensor? kv_lens, "
    "Tensor? table, int max_q, int max_kv, float scale) -> Tensor"
)


def has_flash(q: torch.Tensor) -> bool:
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and installed()


@functools.cache
def installed() -> bool:
    try:
        import vllm.vllm_flash_attn  # noqa: F401
    except ImportError:
        return False
    return True


def flash_attention(
    q: torch.Tensor,  # [Tq, H, D], the queries of canvas after canvas
    k: torch.Tensor,  # [Tk, Hkv, D], or pages [blocks, block_size, Hkv, D]
    v: torch.Tensor,
    q_starts: torch.Tensor,  # [C + 1] int32
    k_starts: torch.Tensor | None,  # [C + 1] int32 of packed keys
    kv_lens: torch.Tensor | None,  # [C] int32 of keys in pages
    table: torch.Tensor | None,  # [C, blocks] int32
    max_q: int,
    max_kv: int,
    scale: float,
) -> torch.Tensor:
    """-> [Tq, H, D]. Rows after the last start are undefined."""
    if not len(q):  # no kernel takes none
        return q
    return torch.ops.vllm_dlm.flash_attention(q, k, v, q_starts, k_starts, kv_lens, table, max_q, max_kv, scale)


def _launch(q, k, v, q_starts, k_starts, kv_lens, table, max_q, max_kv, scale):
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=q_starts,
        cu_seqlens_k=k_starts,
        seqused_k=kv_lens,
        block_table=table,
        max_seqlen_q=max_q,
        max_seqlen_k=max_kv,
        softmax_scale=scale,
        causal=False,
        fa_version=_version(q.shape[2]),
    )


@functools.cache
def _version(head_size: int) -> int:
    """A version that the device has code for; the default of vLLM's function has none for SM90."""
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    return get_flash_attn_version(head_size=head_size) or 2


_LIBRARY.impl("flash_attention", _launch, "CUDA")
torch.library.register_fake("vllm_dlm::flash_attention", lambda q, *rest: q.new_empty(q.shape), lib=_LIBRARY)


class CanvasAttention:
    """Queries of a group's rows in one layer, over all keys of their canvases."""

    def __init__(self, group: Group, blocks: KVBlocks, layer: int, scale: float):
        self.group, self.scale = group, scale
        self.pages: Any = blocks.caches[layer] if blocks.caches else None
        self.packed = None if blocks.layout is None else PackedCanvases(group, blocks, layer, scale)

    def over_new(self, q: torch.Tensor, rows: Rows, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [n, H, D]; k and v [T, Hkv, D] of every row of the canvases -> context [n, H * D]"""
        group = self.group
        if has_flash(q):
            ends = group.key_starts
            context = flash_attention(q, k, v, starts(rows, q), ends, None, None, group.max_q, group.max_kv, self.scale)
        elif self.packed is not None:
            context = self.packed.over_new(q, rows, k, v)
        else:
            context = varlen_attention(q, k, v, rows.counts, group.kv_lens, self.scale)
        return context.flatten(1)

    def over_pages(self, q: torch.Tensor, rows: Rows) -> torch.Tensor:
        """q [n, H, D] over the cached keys of each canvas -> context [n, H * D]"""
        group, pages = self.group, self.pages
        if has_flash(q):
            keys, values = pages.transpose(1, 2).chunk(2, -1)  # [blocks, block_size, Hkv, D]
            context = flash_attention(
                q,
                keys,
                values,
                starts(rows, q),
                None,
                group.key_counts,
                group.table,
                group.max_q,
                group.max_kv,
                self.scale,
            )
        elif self.packed is not None:
            context = self.packed.over_cached(q, rows)
        else:
            context = paged_attention(q, pages, group.tables, rows.counts, group.kv_lens, self.scale)
        return context.flatten(1)

    def delta_over_pages(
        self, q: torch.Tensor, rows: Rows, changed: Rows, moved: torch.Tensor, unused: PickedRows | None = None
    ) -> torch.Tensor:
        """What the `moved` values [S, Hkv, D] of the changed rows add to each query's context -> [n, H * D]"""
        group = self.group
        if unused is not None and unused.place is not None and not q.is_cuda:  # there it would cost more than it saves
            used = torch.ones(len(q), dtype=torch.bool).index_fill_(0, unused.place, False).nonzero()[:, 0]
            counts = [all_ - few for all_, few in zip(rows.counts, unused.rows.counts, strict=True)]
            added = self.delta_over_pages(q[used], Rows(used, counts), changed, moved)
            return added.new_zeros(len(q), added.shape[1]).index_copy_(0, used, added)
        if changed.mask is not None:
            moved = moved * changed.mask[:, None, None]
        if self.packed is not None and self.packed.apart:
            return self.packed.delta(q, rows, changed, moved).flatten(1)
        added = delta_over_pages(
            q,
            starts(rows, q),
            self.pages,
            group.table,
            group.key_counts,
            self.places(changed),
            moved,
            self.scale,
            group.max_q,
            group.max_kv,
        )
        return added.flatten(1)

    def places(self, changed: Rows) -> torch.Tensor:
        """[C, longest stream] int32: index of a position among the changed rows, -1: none"""
        group = self.group
        if changed.index is None and group.places is not None:
            return group.places  # the same for all layers
        places = torch.full((len(group.kv_lens), group.max_kv), -1, dtype=torch.int32, device=group.stream.device)
        number = torch.arange(len(changed), dtype=torch.int32, device=places.device)
        places[changed.gather(group.stream), changed.gather(group.row_places)] = number
        if changed.index is None:
            group.places = places
        return places


def starts(rows: Rows, q: torch.Tensor) -> torch.Tensor:
    """[C + 1] int32"""
    if rows.starts is not None:
        return rows.starts
    return torch.tensor([0, *rows.counts], device=q.device).cumsum(0, dtype=torch.int32)


class GroupAttention:
    def __init__(self, layer: int, group: Group, blocks: KVBlocks, scale: float, counts: Counts):
        self.layer, self.group, self.blocks, self.scale, self.counts = layer, group, blocks, scale, counts
        #: in this layer, the group's responses attend to part of their canvas
        self.selects = group.selection is not None and not group.selection.sees_all(layer)
        self.canvases = CanvasAttention(group, blocks, layer, scale)

    def over_new(self, q: torch.Tensor, rows: Rows, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Queries [n, H, D] over this step's keys and values of every row of their canvas -> [n, H * D]"""
        group = self.group
        if group.drafted is not None:
            return self._of_drafts(q, rows, k, v, group.drafted)
        if group.hidden_row is not None:
            return self._of_shadow(q, rows, k, v, group.hidden_row)
        if group.selection is not None:  # all keys are new, so prompts are summarised again
            group.selection.refresh(self.layer, self.blocks, k, self.counts)
        if group.filtered and self.selects:
            return self._over_selected(q, rows)
        self.counts.attended(rows.counts, group.kv_lens, read=False)
        return self.canvases.over_new(q, rows, k, v)

    def _of_shadow(self, q: torch.Tensor, rows: Rows, k: torch.Tensor, v: torch.Tensor, hidden: int) -> torch.Tensor:
        """Shadow rows over the cached keys of their canvas and over each other"""
        group = self.group
        self.counts.attended(rows.counts, group.kv_lens, read=True)
        context = shadow_attention(
            q,
            starts(rows, q),
            rows.gather(group.row_places) + hidden,
            k,
            v,
            starts(group.all, q),
            self.blocks.caches[self.layer],
            group.table,
            group.key_counts,
            self.scale,
            group.max_q,
        )
        return context.flatten(1)

    def _of_drafts(
        self, q: torch.Tensor, rows: Rows, k: torch.Tensor, v: torch.Tensor, drafted: list[torch.Tensor]
    ) -> torch.Tensor:
        """Drafts and masks over the cached keys of other positions and over each other"""
        group = self.group
        self.counts.attended(rows.counts, group.kv_lens, read=True)
        own = rows.gather(group.row_places - group.key_counts[group.stream])
        context = draft_attention(
            q,
            rows.counts,
            own,
            k,
            v,
            drafted,
            self.blocks.caches[self.layer],
            group.tables,
            group.kv_lens,
            self.scale,
        )
        return context.flatten(1)

    def over_blocks(self, q: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Queries [n, H, D] over the cached keys and values of their canvas -> [n, H * D]"""
        if not len(q):
            return q.flatten(1)
        if self.selects:
            assert self.group.selection is not None
            self.group.selection.summarise_final(self.layer, self.blocks, self.counts)
            return self._over_selected(q, rows)
        self.counts.attended(rows.counts, self.group.kv_lens, read=True)
        return self.canvases.over_pages(q, rows)

    def moved(
        self, q: torch.Tensor, rows: Rows, changed: Rows, moved: torch.Tensor, unused: PickedRows | None
    ) -> torch.Tensor:
        """What the moved values [S, Hkv, D] of the changed rows add to each query's context -> [n, H * D]. On a CPU
        unused rows are left out, but counted."""
        group, selection, out = self.group, self.group.selection, None
        if selection is None or not self.selects:
            self.counts.attended(rows.counts, group.kv_lens, read=True)
            return self.canvases.delta_over_pages(q, rows, changed, moved, unused)
        if any(read := selection.prompts_of(rows)):
            self.counts.attended(read, group.kv_lens, read=True)
            out = self.canvases.delta_over_pages(q, rows, changed, moved).view_as(q)
        if changed.mask is not None:
            moved = moved * changed.mask[:, None, None]
        return selection.delta(self._queries(q, rows), moved, self.canvases.places(changed), out).flatten(1)

    def _over_selected(self, q: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Rows of the response attend to selected keys, rows of the prompt to all keys. If prompt rows are live, all
        rows attend to all keys first: the host may know the number of prompt rows only."""
        group, selection, out = self.group, self.group.selection, None
        assert selection is not None
        if any(read := selection.prompts_of(rows)):
            self.counts.attended(read, group.kv_lens, read=True)
            out = self.canvases.over_pages(q, rows).view_as(q)
        return selection.attend(self._queries(q, rows), out).flatten(1)

    def _queries(self, q: torch.Tensor, rows: Rows) -> ResponseQueries:
        return ResponseQueries(self.layer, self.blocks, q, rows, self.group.voters, self.scale, self.counts)
