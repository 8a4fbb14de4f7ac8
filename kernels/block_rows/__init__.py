"""Rows that live in blocks of the KV cache, read and written by the place of each live row.

A block given to features is the same bytes seen as [rows, width]. Rows of
tensors that are given or returned are named by `index`: row i is live row
index[i], and all of them in order where there is none. What has no place,
because its index or its block is below 0, reads zeros and writes nothing.
"""

from vllm_dlm.kernels.block_rows.dispatch import read_rows, read_values, write_rows

__all__ = ["read_rows", "read_values", "write_rows"]
