"""The k pages of highest score, in ascending order; ties to the lowest page."""

from vllm_dlm.kernels.top_pages.choice import top_pages

__all__ = ["top_pages"]
