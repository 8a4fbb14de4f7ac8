"""Mean and variance of dyadic runs of keys: the Haar wavelet pyramid of cached pages, reading each key once.

With Haar, the low-pass band at scale b is the mean of 2^b neighbours (times
2^(b/2)). By Parseval, the squared detail coefficients below it add up to their
variance (times 2^b). WaveFilter descends the tree of means. UNIQUE needs the
mean and spread of whole pages, the same pyramid at another level.

cache [blocks, Hkv, block_size, 2 * D], keys before values. A page is
`page_size` consecutive positions of a block. `page_size` is a power of two that
divides the block size. With n pages per block, page p starts at position
p % n * page_size of block p // n.
"""

from vllm_dlm.kernels.haar_pyramid.dispatch import mean_and_variance, store_statistics
from vllm_dlm.kernels.haar_pyramid.statistics import (
    INVALID,
    STD_KINDS,
    PageStatistics,
    StdKind,
    spread_of,
    spread_width,
)

__all__ = [
    "INVALID",
    "STD_KINDS",
    "PageStatistics",
    "StdKind",
    "mean_and_variance",
    "spread_of",
    "spread_width",
    "store_statistics",
]
