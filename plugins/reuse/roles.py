"""What a reuse policy can be besides a plan and a layer: classes to derive from."""

from vllm_dlm.plugins.reuse.base import Progress


class WithinBlocks:
    """Goes with block-causal models, where it chooses rows of the current canvas block, see canvas/block_causal.py."""

    def inside(self, at: Progress) -> tuple[int, int] | None:
        """[start, end) of the rows of the block that a step recomputes once the others are cached; None: all of them"""
        raise NotImplementedError
