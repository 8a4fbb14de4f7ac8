"""Dispatches to Triton on a GPU and to torch elsewhere."""

import torch

from vllm_dlm.kernels.haar_pyramid import torch as plain
from vllm_dlm.kernels.haar_pyramid.statistics import PageStatistics
from vllm_dlm.kernels.operators import operator


def _nodes(cache, page_ids, page_size, levels):
    """Empty means and variances of all levels, lowest level first: [n, Hkv, nodes, D] float32 each"""
    nodes = sum(page_size >> level for level in levels)
    made = cache.new_empty(len(page_ids), cache.shape[1], nodes, cache.shape[3] // 2, dtype=torch.float32)
    return made, torch.empty_like(made)


_haar_pyramid = operator(
    "haar_pyramid(Tensor cache, Tensor page_ids, int page_size, int[] levels) -> (Tensor, Tensor)", __package__, _nodes
)
_store_statistics = operator(
    "store_statistics(Tensor cache, Tensor page_ids, Tensor(a!) mean, Tensor(b!) spread, int page_size, str std_kind) "
    "-> ()",
    __package__,
    lambda *args: None,
)


def haar_pyramid(
    cache: torch.Tensor,  # [blocks, Hkv, block_size, 2 * D], keys before values
    page_ids: torch.Tensor,  # [n]
    page_size: int,
    levels: tuple[int, ...],
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """-> for each level b: mean and variance of runs of 2^b keys, [n, Hkv, page_size / 2^b, D] float32 each"""
    if cache.is_cuda:
        ascending = sorted(set(levels))
        sizes = [page_size >> level for level in ascending]
        means, variances = (x.split(sizes, 2) for x in _haar_pyramid(cache, page_ids, page_size, ascending))
        found = dict(zip(ascending, zip(means, variances, strict=True), strict=True))
        return [found[level] for level in levels]
    return plain.haar_pyramid(cache, page_ids, page_size, levels)


def store_statistics(cache: torch.Tensor, page_ids: torch.Tensor, statistics: PageStatistics) -> None:
    """Computes mean and spread of the given pages from their current keys and stores them in `statistics`. Ids below 0
    are skipped, so callers need no data-dependent shapes."""
    if cache.is_cuda:
        kept = statistics.mean, statistics.spread, statistics.page_size, statistics.std_kind
        return _store_statistics(cache, page_ids, *kept)
    return plain.store_statistics(cache, page_ids, statistics)


def mean_and_variance(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Top of the pyramid for keys already gathered, on any device: keys [..., P, D], P a power of two -> [..., D]
    float32 each"""
    ((mean, variance),) = plain.pyramid(keys, (keys.shape[-2].bit_length() - 1,))
    return mean[..., 0, :], variance[..., 0, :]
