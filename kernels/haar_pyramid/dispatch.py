"""Dispatches to Triton on a GPU and to torch elsewhere."""

import torch

from vllm_dlm.kernels.haar_pyramid import torch as plain
from vllm_dlm.kernels.haar_pyramid.statistics import PageStatistics
from vllm_dlm.kernels.operators import operator

_store_statistics = operator(
    "store_statistics(Tensor cache, Tensor page_ids, Tensor(a!) mean, Tensor(b!) spread, int page_size, str std_kind) "
    "-> ()",
    __package__,
    lambda *args: None,
)


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
