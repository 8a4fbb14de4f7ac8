"""Of each canvas the rows of lowest score, forced ones first: how many is known to the host, which ones is not.

Rows starts[c] … starts[c + 1] - 1 are canvas c's, and what is chosen of them
stands in places[c] … places[c + 1] - 1 of the answer, ascending. Ties go to
the lowest row; a score that is not a number is the highest there is. Places
for which there is no row hold -1, so do those from places[C] on.
"""

from vllm_dlm.kernels.lowest_rows.dispatch import lowest_rows

__all__ = ["lowest_rows"]
