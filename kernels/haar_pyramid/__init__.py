"""Mean and variance of dyadic runs of keys: the Haar wavelet pyramid of cached pages, one read of each key.

With Haar, the low-pass band at scale b is the mean of 2^b neighbours (times
2^(b/2)), and by Parseval the squared detail coefficients below it add up to
their variance (times 2^b). WaveFilter descends the means; UNIQUE needs mean
and spread of whole pages: the same pyramid, cut at another level.

cache [blocks, Hkv, block_size, 2 * D], keys before values. A page is
`page_size` (a power of two) positions of a block, which it divides; page p is
positions p % n * page_size … of block p // n, where n pages make a block.
"""

from vllm_dlm.kernels.haar_pyramid.dispatch import haar_pyramid, mean_and_variance, store_statistics
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
    "haar_pyramid",
    "mean_and_variance",
    "spread_of",
    "spread_width",
    "store_statistics",
]
