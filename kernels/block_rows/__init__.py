"""Reads and writes rows stored in blocks of the KV cache, addressed by the block and offset of each live row.

A block that stores features is the same bytes viewed as [rows, width]. `index`
maps rows of an input or output tensor to live rows: row i is live row index[i].
Without `index`, row i is live row i. A row whose index or block is below 0 has
no place in the cache: reads return zeros and writes are skipped.
"""

from vllm_dlm.kernels.block_rows.dispatch import read_keys, read_rows, read_values, write_rows

__all__ = ["read_keys", "read_rows", "read_values", "write_rows"]
