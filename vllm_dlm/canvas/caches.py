"""KV blocks and selected keys of each stream of a request, in one worker."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vllm_dlm.cache.budget import BlockShape
from vllm_dlm.canvas.commit import NOTHING
from vllm_dlm.canvas.selected_keys import ChoicePool, SelectedKeys
from vllm_dlm.client_cache import ClientCache
from vllm_dlm.plugins.selection.base import Selection

if TYPE_CHECKING:
    from vllm_dlm.canvas.denoising import Denoising


class Blocks(NamedTuple):
    """Ids of the KV blocks of one stream, in order, by content; see BlockShape.blocks."""

    kv: np.ndarray
    features: np.ndarray
    summaries: np.ndarray
    speculative: np.ndarray  # keys and values of the speculative canvases, one canvas after the other


NO_BLOCKS = Blocks(NOTHING, NOTHING, NOTHING, NOTHING)


class StreamCaches:
    """Assigns KV blocks to the streams of requests and keeps one choice pool per selection."""

    def __init__(self, shape: BlockShape):
        self.shape = shape
        self.pools: ClientCache[Selection, ChoicePool] = ClientCache("choice_pools")

    def grow(self, state: "Denoising", table: np.ndarray) -> None:
        """Assigns the new blocks of a request whose canvas has grown, stream by stream and then by content. `table`:
        all blocks of the request"""
        options, canvas = state.options, state.canvas
        sizes = self.shape.blocks(options, canvas.prompt_len, len(canvas), canvas.rows)
        start = sum(len(part) for own in state.blocks.values() for part in own)
        for stream in range(canvas.streams):
            parts = []
            for part, size in zip(state.blocks.get(stream, NO_BLOCKS), sizes, strict=True):
                # Without caches the streams use no blocks, even if vLLM has allocated some.
                first, start = start, start + (size - len(part)) * options.caches
                parts.append(np.concatenate([part, table[first:start]]))
            own = state.blocks[stream] = Blocks(*parts)
            if (selected := state.selected.get(stream)) is None:
                state.selected[stream] = self._selected_keys(state, own)
            else:
                selected.length, selected.kv_table = canvas.rows, own.kv
        state.rows = canvas.rows

    def _selected_keys(self, state: "Denoising", own: Blocks) -> SelectedKeys | None:
        selection, canvas = state.options.selection, state.canvas
        if state.options.attention != "full" or not selection.applies(canvas.prompt_len, len(canvas)):
            return None
        frozen = state.options.reuse.keeps_contexts
        return self.selected_keys(selection, canvas.prompt_len, canvas.rows, own, frozen)

    def selected_keys(
        self,
        selection: Selection,
        prompt_len: int,
        length: int,
        own: Blocks,
        frozen: bool = False,
        described: bool = True,
    ) -> SelectedKeys:
        size, pool = self.shape.block_size, self.pool(selection)
        return SelectedKeys(
            selection, prompt_len, length, size, own.kv, own.summaries, frozen, pool, described=described
        )

    def pool(self, selection: Selection) -> ChoicePool:
        """The choice pool of a selection. Selected keys keep a reference to a pool that is evicted here. Selected keys
        of different pools never share a group."""
        pool = self.pools.get(selection)
        return self.pools.put(selection, ChoicePool()) if pool is None else pool
