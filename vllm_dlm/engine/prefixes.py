"""Keys and values that requests share: vLLM's prefix cache, for models whose finished blocks never change.

vLLM gives a block of the KV cache its hash when the block is handed out, since
the same step fills it. A canvas is filled later, and what is still masked in
it is not final. So a block gets its hash here, once a step has come back after
which all of its positions are written for good (`Canvas.written`): of a prompt
step by step as it is read, of an answer when the step after a canvas block has
read that once more. Both are the same function of the tokens before them.

Keys also depend on the width of canvas blocks, of which vLLM's hashes know
nothing: the front-end puts it into the salt (integration/requests.py). Read in vLLM 0.32 and 0.33:
v1/core/kv_cache_manager.py, v1/core/kv_cache_utils.py.
"""

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.request import Request

from vllm_dlm.canvas import block_causal
from vllm_dlm.canvas.canvas import Canvas


class Prefixes:
    def __init__(self, manager: KVCacheManager, block_size: int):
        self.manager, self.block_size = manager, block_size

    def shares(self, canvas: Canvas) -> bool:
        """Whether the hash of each block of the KV cache says all there is to know of it: the text up to its end. Where
        canvas blocks reach beyond that, keys depend on what stands there; a guidance twin has another text; summaries
        of a selection lie between the keys; and what was filled into a prompt's masks is in no hash."""
        masks = canvas.mask_id in canvas.tokens[: canvas.prompt_len]
        alone = canvas.streams == 1 and not canvas.options.selection.sparse
        # vLLM caches no prefixes of other models, whose canvas blocks may have no width
        shareable = self.manager.enable_caching and alone and not masks
        return shareable and self.block_size % canvas.options.decoding.block_length == 0

    def find(self, request: Request, canvas: Canvas) -> KVCacheBlocks:
        """The blocks that are there for the canvas's first positions. It begins behind them."""
        found, written = self.manager.empty_kv_cache_blocks, 0
        if self.shares(canvas) and self.manager.prefix_cache_lookup_enabled(request):
            final = block_causal.final(canvas)
            blocks, written, _ = self.manager.coordinator.find_longest_cache_hit(request.block_hashes, final)
            found = self.manager.create_kv_cache_blocks(blocks)
        canvas.begin_behind(written)
        return found

    def admitted(self, request: Request, canvas: Canvas) -> None:
        """For vLLM's metrics"""
        if self.shares(canvas):
            self.manager.record_prefix_cache_stats(request, canvas.written)

    def keep(self, request: Request, canvas: Canvas) -> None:
        """More positions of the canvas are final."""
        if self.shares(canvas):
            self.manager.cache_blocks(request, canvas.written)

    def forget(self, request_id: str) -> None:
        """Something went wrong with a request: nobody shall find its blocks."""
        self.manager.evict_blocks({block for group in self.manager.get_block_ids(request_id) for block in group})
