"""Bidirectional attention of packed queries over keys and values in blocks of a cache."""

from vllm_dlm.kernels.paged_attention.dispatch import gather, paged_attention

__all__ = ["gather", "paged_attention"]
