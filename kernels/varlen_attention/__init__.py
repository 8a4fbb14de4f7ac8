"""Bidirectional attention over packed sequences of different lengths: each query sees all keys of its sequence."""

from vllm_dlm.kernels.varlen_attention.dispatch import varlen_attention

__all__ = ["varlen_attention"]
