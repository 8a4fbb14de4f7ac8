"""Selects the lowest-scored rows of each canvas, forced rows first. The host knows how many rows, but not which.

Rows starts[c] … starts[c + 1] - 1 belong to canvas c. Its selected rows are
written in ascending order to entries places[c] … places[c + 1] - 1 of the
result. Ties go to the lowest row, and NaN counts as the highest score. Entries
without a row hold -1, as do all entries from places[C] on.
"""

from vllm_dlm.kernels.lowest_rows.dispatch import lowest_rows

__all__ = ["lowest_rows"]
