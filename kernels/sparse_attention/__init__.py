"""Attention of a request's queries over the chosen pages of its cache. Each key head has its own choice."""

from vllm_dlm.kernels.sparse_attention.dispatch import sparse_attention, sparse_delta
from vllm_dlm.kernels.sparse_attention.torch import listed

__all__ = ["listed", "sparse_attention", "sparse_delta"]
