"""Attention of drafts and of the masks that judge them, over each other and over a canvas's other cached keys."""

from vllm_dlm.kernels.draft_attention.dispatch import draft_attention

__all__ = ["draft_attention"]
