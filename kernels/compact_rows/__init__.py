"""Which rows are marked, in a list whose length does not depend on it.

The host need not know how many there are: lists have room for `capacity` and
end with -1. Where more are marked the first ones are listed and counts stay
within the list, so a list that is full is one that rows may be missing from.
"""

from vllm_dlm.kernels.compact_rows.dispatch import compact_rows

__all__ = ["compact_rows"]
