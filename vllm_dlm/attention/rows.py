"""Generated positions as the page kernels see them: requests of one query each."""

from dataclasses import dataclass

import torch

from vllm_dlm.kernels.haar_pyramid import PageStatistics
from vllm_dlm.kernels.page_scores import page_scores
from vllm_dlm.kernels.sparse_attention import sparse_attention
from vllm_dlm.kernels.top_pages import top_pages
from vllm_dlm.plugins.selection.base import Selection


@dataclass
class Rows:
    """B queries; tensors on the device of the cache."""

    rows: slice | torch.Tensor  # where they are in the step's queries
    q_starts: torch.Tensor  # [B + 1]
    page_table: torch.Tensor  # [B, N] physical pages, in order
    num_pages: torch.Tensor  # [B]
    kv_lens: torch.Tensor  # [B]
    forced_from: torch.Tensor  # [B]
    pages_seen: int  # sum of num_pages
    pages_read: int  # of them those that are attended to


def page_table(block_table: torch.Tensor, blocks_per_row: int, pages_per_block: int) -> torch.Tensor:
    """[B, n] blocks -> [B, blocks_per_row * pages_per_block] pages"""
    blocks = block_table[:, :blocks_per_row, None] * pages_per_block
    part = torch.arange(pages_per_block, device=blocks.device, dtype=blocks.dtype)
    return (blocks + part).flatten(1)


def make_rows(
    selection: Selection, rows: list[int], kv_lens: torch.Tensor, longest: int, block_table: torch.Tensor,
    pages_per_block: int, page_sum: int, read_all: bool,
) -> Rows:  # fmt: skip
    """`kv_lens` [B] int32 and `block_table` [B, n] on the device; `longest` bounds kv_lens, `page_sum` is their pages."""
    device, size = kv_lens.device, selection.page_size
    width = -(-longest // size)
    num_pages = (kv_lens + size - 1) // size
    whole = rows == list(range(rows[0], rows[0] + len(rows)))
    return Rows(
        rows=slice(rows[0], rows[0] + len(rows)) if whole else to_device(rows, device),
        q_starts=torch.arange(len(rows) + 1, device=device, dtype=torch.int32),
        page_table=page_table(block_table, -(-width // pages_per_block), pages_per_block)[:, :width].contiguous(),
        num_pages=num_pages,
        kv_lens=kv_lens,
        # The last page may be unfinished, and its keys unknown to the statistics.
        forced_from=(num_pages - selection.recent_pages).clamp_min(0),
        pages_seen=page_sum,
        pages_read=page_sum if read_all else len(rows) * selection.budget_pages,
    )


def to_device(values: list[int], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def attend_chosen(
    q: torch.Tensor, rows: Rows, pages: torch.Tensor, statistics: PageStatistics, selection: Selection, scale: float
) -> torch.Tensor:
    """q [B, H, D], pages [blocks, Hkv, block_size, 2 * D] -> [B, H, D]"""
    scores = page_scores(
        q, rows.q_starts, statistics, rows.page_table, rows.num_pages, rows.forced_from,
        selection.sink_pages, selection.lam, selection.reduce,
    )  # fmt: skip
    chosen = top_pages(scores, selection.budget_pages)  # [B, Hkv, budget]
    return sparse_attention(
        q, rows.q_starts, pages, rows.page_table, chosen, rows.kv_lens, selection.page_size, scale, True
    )


def attend_all(q: torch.Tensor, rows: Rows, pages: torch.Tensor, page_size: int, scale: float) -> torch.Tensor:
    """The same kernel told to read every page: what `attend_chosen` is with a budget of them all."""
    page = torch.arange(rows.page_table.shape[1], device=q.device, dtype=torch.int32)
    chosen = torch.where(page < rows.num_pages[:, None], page, -1)  # [B, N]
    chosen = chosen[:, None].expand(-1, pages.shape[1], -1)
    return sparse_attention(q, rows.q_starts, pages, rows.page_table, chosen, rows.kv_lens, page_size, scale, True)
