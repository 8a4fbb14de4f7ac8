"""Attention of shadow rows over the new keys of all shadow rows of the canvas, and over the canvas's cached keys except
for one position per row."""

from vllm_dlm.kernels.shadow_attention.dispatch import shadow_attention

__all__ = ["shadow_attention"]
