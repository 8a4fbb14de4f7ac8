"""Cases of page-sparse attention, one decoding step each, and their operations against the definitions."""

from dataclasses import dataclass

import torch

from vllm_dlm.kernels.haar_pyramid import PageStatistics, store_statistics
from vllm_dlm.kernels.page_scores import naive as naive_scores
from vllm_dlm.kernels.page_scores import page_scores
from vllm_dlm.kernels.sparse_attention import naive as naive_attention
from vllm_dlm.kernels.sparse_attention import sparse_attention
from vllm_dlm.kernels.top_pages import naive as naive_top
from vllm_dlm.kernels.top_pages import top_pages

HEADS, KV_HEADS, DIM = 32, 8, 128
PAGE, BUDGET, LAM = 64, 2048, 0.5
SINK, RECENT = 1, 2


@dataclass
class Case:
    """B requests of equal length whose pages lie anywhere."""

    q: torch.Tensor  # [B * L, H, D]
    q_starts: torch.Tensor
    pages: torch.Tensor  # [blocks, Hkv, PAGE, 2 * D]
    page_table: torch.Tensor  # [B, N]
    kv_lens: torch.Tensor
    statistics: PageStatistics
    queries: int
    num_pages: torch.Tensor  # [B]
    forced_from: torch.Tensor  # [B]; known before a step's layers, as num_pages are

    @classmethod
    def random(cls, keys: int, batch: int, queries: int, device, dtype=torch.bfloat16, std_kind="l2") -> "Case":
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
        return cls(
            q,
            starts,
            pages,
            order.view(batch, count),
            torch.full((batch,), keys, device=device),
            statistics,
            queries,
            torch.full((batch,), count, device=device),
            torch.full((batch,), count - RECENT, device=device),
        )

    def score(self, function=page_scores):
        return function(
            self.q, self.q_starts, self.statistics, self.page_table, self.num_pages, self.forced_from, SINK, LAM, "max"
        )

    def attend(self, chosen: torch.Tensor, function=sparse_attention):
        return function(self.q, self.q_starts, self.pages, self.page_table, chosen, self.kv_lens, PAGE, DIM**-0.5, True)


def check(device: torch.device) -> int:
    """Every operation against its definition, at shapes that have partly filled pages and few of them."""
    checked = 0
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
        for keys, queries, std_kind in (
            (1000, 1, "l2"),
            (500, 3, "vector"),
            (640, 2, "diag2"),
            (777, 8, "rms"),
        ):
            case = Case.random(keys, 2, queries, device, dtype, std_kind)
            here = Case(**{
                name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in vars(case).items()
            })  # fmt: skip
            here.statistics = PageStatistics(case.statistics.mean.cpu(), case.statistics.spread.cpu(), PAGE, std_kind)
            scores = case.score()
            torch.testing.assert_close(
                scores.cpu().double(), here.score(naive_scores.page_scores), atol=tolerance, rtol=tolerance
            )
            chosen = top_pages(scores, 5)
            assert torch.equal(chosen.cpu(), naive_top.top_pages(scores.cpu(), 5))
            want = here.attend(chosen.cpu(), naive_attention.sparse_attention)
            torch.testing.assert_close(case.attend(chosen).cpu(), want, atol=tolerance, rtol=tolerance)
            checked += 3
    return checked
