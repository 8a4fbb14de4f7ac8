"""vLLM's prefix cache for models whose finished blocks never change.

vLLM hashes a KV block when it allocates the block, because the same step fills
it. A canvas is filled later, and masked positions are not final. Here a block is
hashed after the step that wrote the final keys and values of all its positions
(`Canvas.written`). For a prompt these are the steps that read it, for an answer
the step after a canvas block is finished. Both are the same function of the
tokens before them.

Keys also depend on the canvas block length, which vLLM's hashes do not include.
The front-end adds it to the salt (integration/requests.py). Read in vLLM 0.32 and 0.33:
v1/core/kv_cache_manager.py, v1/core/kv_cache_utils.py.
"""

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.request import Request

from vllm_dlm.canvas import block_causal
from vllm_dlm.canvas.canvas import Canvas


class Prefixes:
    """Finds and stores cached prefixes of canvases."""

    def __init__(self, manager: KVCacheManager, block_size: int):
        self.manager, self.block_size = manager, block_size

    def shares(self, canvas: Canvas) -> bool:
        """Whether the text up to the end of a KV block, which vLLM hashes, determines its content. It does not if
        canvas blocks extend beyond the KV block, if an unconditional stream has another text, if KV blocks include
        summaries of a selection, or if masks of the prompt were filled."""
        masks = canvas.mask_id in canvas.tokens[: canvas.prompt_len]
        alone = canvas.streams == 1 and not canvas.options.selection.sparse
        # caching is disabled for other models, which may have no canvas block length
        shareable = self.manager.enable_caching and alone and not masks
        return shareable and self.block_size % canvas.options.decoding.block_length == 0

    def find(self, request: Request, canvas: Canvas) -> KVCacheBlocks:
        """The cached blocks of the canvas's first positions. Sets the canvas to start after them."""
        found, written = self.manager.empty_kv_cache_blocks, 0
        if self.shares(canvas) and self.manager.prefix_cache_lookup_enabled(request):
            # The last of these rows may have to predict the position behind them.
            final = max(block_causal.final(canvas) - canvas.shift, 0)
            blocks, written, _ = self.manager.coordinator.find_longest_cache_hit(request.block_hashes, final)
            found = self.manager.create_kv_cache_blocks(blocks)
        canvas.start_after(written)
        return found

    def admitted(self, request: Request, canvas: Canvas) -> None:
        """Records the hit for vLLM's metrics."""
        if self.shares(canvas):
            self.manager.record_prefix_cache_stats(request, canvas.written)

    def keep(self, request: Request, canvas: Canvas) -> None:
        """Hashes the blocks that are final after this step."""
        if self.shares(canvas):
            self.manager.cache_blocks(request, canvas.written)

    def forget(self, request_id: str) -> None:
        """Removes the blocks of a failed request from the cache."""
        self.manager.evict_blocks({block for group in self.manager.get_block_ids(request_id) for block in group})
