"""Optional roles of reuse policies: classes to derive from."""

from vllm_dlm.plugins.reuse.base import Progress


class WithinBlocks:
    """Works with block-causal models, where it chooses rows of the current canvas block, see canvas/block_causal.py."""

    def inside(self, at: Progress) -> tuple[int, int] | None:
        """[start, end) of the rows of the block that a step recomputes if the others are cached; None: all of them"""
        raise NotImplementedError
