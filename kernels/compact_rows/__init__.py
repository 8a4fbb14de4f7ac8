"""Indices of marked rows, in a list of fixed length.

The host need not know how many rows are marked: the list has `capacity` entries
and is padded with -1. If more rows are marked, only the first ones are listed
and counts are clamped to `capacity`. A full list may therefore be incomplete.
"""

from vllm_dlm.kernels.compact_rows.dispatch import compact_rows

__all__ = ["compact_rows"]
