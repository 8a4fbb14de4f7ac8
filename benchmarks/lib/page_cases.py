"""Cases of page-sparse attention, one decoding step each."""

from dataclasses import dataclass

import torch

from vllm_dlm.kernels.haar_pyramid import PageStatistics, store_statistics
from vllm_dlm.kernels.page_scores import ScoringQueries, page_scores
from vllm_dlm.kernels.sparse_attention import sparse_attention

HEADS, KV_HEADS, DIM = 32, 8, 128
PAGE, BUDGET, LAM = 64, 2048, 0.5
SINK, RECENT = 1, 2


@dataclass
class PageCase:
    """B requests of equal length, their pages in random order"""

    q: torch.Tensor  # [B * L, H, D]
    q_starts: torch.Tensor
    pages: torch.Tensor  # [blocks, Hkv, PAGE, 2 * D]
    page_table: torch.Tensor  # [B, N]
    kv_lens: torch.Tensor
    statistics: PageStatistics
    queries: int
    num_pages: torch.Tensor  # [B]
    forced_from: torch.Tensor  # [B]

    @classmethod
    def random(cls, keys: int, batch: int, queries: int, device, dtype=torch.bfloat16, std_kind="l2") -> "PageCase":
        generator = torch.Generator(device).manual_seed(keys + batch)
        count = -(-keys // PAGE)
        pages = torch.empty(batch * count, KV_HEADS, PAGE, 2 * DIM, dtype=dtype, device=device)
        for part in pages.split(64):
            part.copy_(torch.randn(part.shape, generator=generator, device=device))
        order = torch.randperm(batch * count, generator=generator, device=device)
        statistics = PageStatistics.empty(pages, PAGE, std_kind)
        for ids in order.split(256):
            store_statistics(pages, ids, statistics)
        q = torch.randn(batch * queries, HEADS, DIM, generator=generator, device=device).to(dtype)
        starts = torch.arange(0, batch * queries + 1, queries, device=device)
        counts = torch.full((batch,), count, device=device)
        lens = torch.full((batch,), keys, device=device)
        table = order.view(batch, count)
        return cls(q, starts, pages, table, lens, statistics, queries, counts, counts - RECENT)

    def score(self, function=page_scores):
        queries = ScoringQueries(self.q, self.q_starts[:-1], self.q_starts[1:], LAM, "max")
        return function(queries, self.statistics, self.page_table, self.num_pages, self.forced_from, SINK)

    def attend(self, chosen: torch.Tensor, function=sparse_attention):
        return function(self.q, self.q_starts, self.pages, self.page_table, chosen, self.kv_lens, PAGE, DIM**-0.5, True)
