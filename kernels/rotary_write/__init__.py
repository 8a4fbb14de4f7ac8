"""Rotary embedding of new queries and keys, and the write of keys and values to the KV cache, in one launch.

With x split into halves [a, b], and the cosines c and sines s of a row's
position: x' = [a c - b s, b c + a s], in the precision of the table.

`index` maps rows to live rows, which positions, block and offset describe: row
i of q, k and v is live row index[i]. Rows with index -1 are padding. Rows with
block -1 are not written to the cache.
"""

from vllm_dlm.kernels.rotary_write.dispatch import rotary_write
from vllm_dlm.kernels.rotary_write.torch import rotate

__all__ = ["rotary_write", "rotate"]
