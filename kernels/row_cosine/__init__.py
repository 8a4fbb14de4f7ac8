"""Cosine similarity of rows, like torch.nn.functional.cosine_similarity with eps 1e-8."""

from vllm_dlm.kernels.row_cosine.dispatch import row_cosine, row_products

__all__ = ["row_cosine", "row_products"]
