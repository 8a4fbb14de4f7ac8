"""KV blocks of canvases, taken from vLLM's pool. Read in vLLM 0.32 and 0.33: v1/core/kv_cache_manager.py."""

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.request import Request

from vllm_dlm.cache.budget import BlockShape
from vllm_dlm.canvas.canvas import Canvas


class CanvasMemory:
    def __init__(self, manager: KVCacheManager, shape: BlockShape):
        self.manager, self.shape = manager, shape
        # Guidance doubles the blocks and policies store features, so a canvas may use more blocks than its tokens fill.
        manager.max_model_len = 1 << 40

    @property
    def free(self) -> int:
        return self.manager.block_pool.get_num_free_blocks()

    def blocks(self, canvas: Canvas, rows: int | None = None) -> int:
        """Number of blocks of a canvas with `rows` rows; None: its current rows"""
        rows = canvas.rows if rows is None else rows
        return self.shape.tokens(canvas.options, canvas.prompt_len, len(canvas), rows) // self.shape.block_size

    def check_size(self, canvas: Canvas) -> None:
        """Raises if the canvas can never fit. The front-end has checked this only against the average of all
        replicas."""
        needed, room = self.blocks(canvas, len(canvas)), self.manager.block_pool.num_gpu_blocks - 1
        if needed > room:
            raise MemoryError(f"the canvas takes {needed} blocks of the KV cache, but this replica has {room}")

    def fits(self, canvas: Canvas, shared: KVCacheBlocks, others_run: bool) -> bool:
        """Whether enough blocks are free for a request that starts with this cached prefix"""
        kept_free = self.manager.watermark_blocks if others_run else 0
        # cached blocks that no request holds count as free
        held = sum(block.ref_cnt > 0 for group in shared.blocks for block in group)
        return self.blocks(canvas) - held + kept_free <= self.free

    def allocate(self, request: Request, canvas: Canvas, shared: KVCacheBlocks, others_run: bool) -> None:
        tokens = self.blocks(canvas) * self.shape.block_size
        blocks = self.manager.allocate_slots(
            request,
            tokens - canvas.written,
            canvas.written,
            shared,
            delay_cache_blocks=True,
            has_scheduled_reqs=others_run,
        )
        assert blocks is not None, "free blocks were counted before"

    def missing(self, request: Request, canvas: Canvas) -> int:
        """Number of additional blocks that a running request needs for its next step"""
        return self.blocks(canvas) - len(self.manager.get_block_ids(request.request_id)[0])

    def grow(self, request: Request, canvas: Canvas) -> tuple[list[int], ...]:
        """Allocates the missing blocks -> their ids"""
        tokens = self.blocks(canvas) * self.shape.block_size - request.num_computed_tokens
        blocks = self.manager.allocate_slots(request, tokens, delay_cache_blocks=True)
        assert blocks is not None, "free blocks were counted before"
        return blocks.get_block_ids()
