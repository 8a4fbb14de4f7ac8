"""Random paged caches for the page kernels: shuffled blocks, pages shared between requests, partly filled ends."""

import torch

from vllm_dlm.kernels.haar_pyramid import PageStatistics, store_statistics
from vllm_dlm.kernels.page_scores import ScoringQueries


class PagedBatch:
    """B requests with shuffled pages in a cache; unused memory is NaN."""

    def __init__(
        self, kv_lens, q_lens, heads=4, kv_heads=2, dim=64, page_size=16, per_block=2, dtype=torch.float32, seed=0
    ):
        g = torch.Generator().manual_seed(seed)
        self.page_size, self.kv_lens, self.dtype = page_size, torch.tensor(kv_lens), dtype
        block_size = page_size * per_block
        needed = [-(-n // block_size) for n in kv_lens]
        total = sum(needed) + 3
        order = torch.randperm(total, generator=g)
        self.pages = torch.full((total, kv_heads, block_size, 2 * dim), torch.nan, dtype=dtype)
        tables, start = [], 0
        for length, count in zip(kv_lens, needed, strict=True):
            blocks = order[start : start + count]
            start += count
            for i, block in enumerate(blocks.tolist()):
                filled = min(block_size, length - i * block_size)
                self.pages[block, :, :filled] = torch.randn(kv_heads, filled, 2 * dim, generator=g).to(dtype)
            tables.append((blocks[:, None] * per_block + torch.arange(per_block)).flatten()[: -(-length // page_size)])
        self.page_table = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True)
        self.num_pages = torch.tensor([len(t) for t in tables])
        self.q_starts = torch.tensor([0, *q_lens]).cumsum(0)
        self.q = torch.randn(sum(q_lens), heads, dim, generator=g).to(dtype)
        self.kv_heads = kv_heads
        self.full_pages = torch.cat([t[: n // page_size] for t, n in zip(tables, kv_lens, strict=True)])

    def statistics(self, std_kind):
        statistics = PageStatistics.empty(self.pages, self.page_size, std_kind)
        store_statistics(self.pages, self.full_pages, statistics)
        return statistics


def scored(function, q, starts, statistics, table, counts, forced_from, sinks, lam, reduce, ends=None, *more):
    """Scores of pages. `ends`: None where the next request's queries start; `more`: voters and sharpness"""
    if ends is None:  # `narrow`, because tensors of `fake_gpu` cannot be sliced
        starts, ends = starts.narrow(0, 0, len(starts) - 1), starts.narrow(0, 1, len(starts) - 1)
    return function(ScoringQueries(q, starts, ends, lam, reduce, *more), statistics, table, counts, forced_from, sinks)
