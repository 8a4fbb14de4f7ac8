"""Attention of a request's queries over chosen pages of its cache, chosen per key head."""

from vllm_dlm.kernels.sparse_attention.dispatch import sparse_attention, sparse_delta

__all__ = ["sparse_attention", "sparse_delta"]
