"""Which implementation runs, and the pyramid's top stored as page statistics."""

import torch

from vllm_dlm.kernels.haar_pyramid import torch as plain
from vllm_dlm.kernels.haar_pyramid.statistics import PageStatistics, spread_of


def haar_pyramid(pages: torch.Tensor, page_ids: torch.Tensor, page_size: int, levels: tuple[int, ...]):
    """Of pages [blocks, Hkv, block_size, 2 * D] those of `page_ids` [n]: for each level b mean and variance of runs
    of 2^b keys, [n, Hkv, page_size / 2^b, D] float32 each."""
    if pages.is_cuda:
        from vllm_dlm.kernels.haar_pyramid import triton

        return triton.haar_pyramid(pages, page_ids, page_size, levels)
    return plain.haar_pyramid(pages, page_ids, page_size, levels)


def store_statistics(pages: torch.Tensor, page_ids: torch.Tensor, statistics: PageStatistics) -> None:
    """Mean and spread of the named pages from the keys that lie there now. On CUDA ids below 0 are passed over, so
    that callers need no data-dependent shapes; on CPU callers leave them out."""
    if pages.is_cuda:
        from vllm_dlm.kernels.haar_pyramid import triton

        return triton.store_statistics(pages, page_ids, statistics)
    if len(page_ids):
        store_statistics_of(plain.keys_of(pages, page_ids, statistics.page_size), page_ids, statistics)


def store_statistics_of(keys: torch.Tensor, page_ids: torch.Tensor, statistics: PageStatistics) -> None:
    """The same of pages whose keys [n, Hkv, P, D] the caller has read himself."""
    level = (statistics.page_size // statistics.mean.shape[2]).bit_length() - 1
    ((mean, variance),) = plain.pyramid(keys, (level,))
    statistics.mean[page_ids] = mean.to(statistics.mean.dtype)
    statistics.spread[page_ids] = spread_of(variance.expand_as(mean), statistics.std_kind)


def runs_of(keys: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of keys that do not lie in pages: [N, Hkv, D] -> mean and variance of the runs of `size` (a power of
    two) neighbours, [N // size, Hkv, D] float32 each; keys beyond the last whole run are left out."""
    runs = keys[: len(keys) // size * size].unflatten(0, (-1, size)).transpose(1, 2)  # [R, Hkv, size, D]
    ((mean, variance),) = plain.pyramid(runs, (size.bit_length() - 1,))
    return mean[:, :, 0], variance[:, :, 0]
