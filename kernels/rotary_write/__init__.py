"""Rotary embedding of new queries and keys, and the keys' and values' way into the KV cache, in one launch.

With x = [a, b], its halves, and the cosines c and sines s of a row's position:
x' = [a c - b s, b c + a s], in the precision of the table.

Tensors of live rows (positions, block, offset) are named by `index`: row i of
q, k and v is live row index[i]. Rows of index -1 are padding, and those of
block -1 have no place in the cache.
"""

from vllm_dlm.kernels.rotary_write.dispatch import rotary_write
from vllm_dlm.kernels.rotary_write.torch import rotate

__all__ = ["rotary_write", "rotate"]
