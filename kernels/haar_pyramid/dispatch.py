"""Which implementation runs."""

import torch

from vllm_dlm.kernels.haar_pyramid import torch as plain
from vllm_dlm.kernels.haar_pyramid.statistics import PageStatistics


def haar_pyramid(
    cache: torch.Tensor,  # [blocks, Hkv, block_size, 2 * D], keys before values
    page_ids: torch.Tensor,  # [n]
    page_size: int,
    levels: tuple[int, ...],
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """-> for each level b mean and variance of runs of 2^b keys, [n, Hkv, page_size / 2^b, D] float32 each"""
    if cache.is_cuda:
        from vllm_dlm.kernels.haar_pyramid import triton

        return triton.haar_pyramid(cache, page_ids, page_size, levels)
    return plain.haar_pyramid(cache, page_ids, page_size, levels)


def store_statistics(cache: torch.Tensor, page_ids: torch.Tensor, statistics: PageStatistics) -> None:
    """Mean and spread of the named pages from the keys that lie there now. Ids below 0 are passed over, so that
    callers need no data-dependent shapes."""
    if cache.is_cuda:
        from vllm_dlm.kernels.haar_pyramid import triton

        return triton.store_statistics(cache, page_ids, statistics)
    return plain.store_statistics(cache, page_ids, statistics)


def mean_and_variance(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pyramid's top, of keys that the caller has read himself and on any device: keys [..., P, D], P a power of
    two -> [..., D] float32 each"""
    ((mean, variance),) = plain.pyramid(keys, (keys.shape[-2].bit_length() - 1,))
    return mean[..., 0, :], variance[..., 0, :]
