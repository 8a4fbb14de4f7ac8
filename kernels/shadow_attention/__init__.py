"""Attention of shadow rows: over their canvas's cached keys but for one each, and over each other's new ones."""

from vllm_dlm.kernels.shadow_attention.dispatch import shadow_attention

__all__ = ["shadow_attention"]
