"""The k pages of highest score, in ascending order; ties to the lowest page."""

from vllm_dlm.kernels.top_pages.dispatch import overlap, physical_pages, top_pages

__all__ = ["overlap", "physical_pages", "top_pages"]
