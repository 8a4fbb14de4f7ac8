"""The k highest-scored pages, in ascending order; ties go to the lowest page."""

from vllm_dlm.kernels.top_pages.dispatch import physical_pages, store_top_pages, top_pages, unless_alike

__all__ = ["physical_pages", "store_top_pages", "top_pages", "unless_alike"]
