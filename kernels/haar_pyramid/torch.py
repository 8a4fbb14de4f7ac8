"""The pyramid by pairwise sums, in float32."""

import torch

from vllm_dlm.kernels.haar_pyramid.statistics import spread_of


def haar_pyramid(cache, page_ids, page_size, levels):
    """-> for each level b: mean and variance of runs of 2^b keys, [n, Hkv, page_size / 2^b, D] float32 each"""
    return pyramid(keys_of(cache, page_ids, page_size), levels)


def store_statistics(cache, page_ids, statistics):
    """See dispatch.py"""
    page_ids = page_ids[page_ids >= 0].long()
    level = (statistics.page_size // statistics.mean.shape[2]).bit_length() - 1
    ((mean, variance),) = haar_pyramid(cache, page_ids, statistics.page_size, (level,))
    statistics.mean[page_ids] = mean.to(statistics.mean.dtype)
    statistics.spread[page_ids] = spread_of(variance.expand_as(mean), statistics.std_kind)


def keys_of(cache, page_ids, page_size):
    """-> [n, Hkv, P, D]"""
    blocks, kv_heads, block_size, width = cache.shape
    per_block, dim = block_size // page_size, width // 2
    runs = cache.view(blocks, kv_heads, per_block, page_size, width)
    return runs[page_ids // per_block, :, page_ids % per_block, :, :dim]


def pyramid(keys, levels):
    """keys [..., P, D] -> for each level b: mean and variance of runs of 2^b keys, [..., P / 2^b, D] float32 each"""
    mean = keys.float()
    variance = torch.zeros_like(mean[..., :1, :1]).expand_as(mean)
    out = {0: (mean, variance)}
    for level in range(1, max(levels) + 1):
        even, odd = mean[..., 0::2, :], mean[..., 1::2, :]
        mean = (even + odd) / 2
        # The detail coefficient of a pair is their difference over the root of 2. It adds the square of half the
        # distance between the means to the variance of the run.
        between = ((even - odd) / 2).square_()
        if level > 1:
            between += (variance[..., 0::2, :] + variance[..., 1::2, :]) / 2
        variance = between
        out[level] = (mean, variance)
    return [out[level] for level in levels]
