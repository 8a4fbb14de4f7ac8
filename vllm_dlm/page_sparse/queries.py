"""Generated positions as the page kernels see them: requests of one query each."""

from dataclasses import dataclass

import torch

from vllm_dlm.kernels.haar_pyramid import PageStatistics
from vllm_dlm.kernels.page_scores import page_scores
from vllm_dlm.kernels.top_pages import top_pages
from vllm_dlm.page_sparse.partition import pages_of
from vllm_dlm.plugins.selection.base import Selection


@dataclass
class Queries:
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


def make_queries(
    selection: Selection, rows: list[int], kv_lens: torch.Tensor, keys: list[int], block_table: torch.Tensor,
    pages_per_block: int,
) -> Queries:  # fmt: skip
    """`kv_lens` [B] int32 and `block_table` [B, n] on the device; `keys` is what the host knows of
    kv_lens, and bounds them."""
    device, size = kv_lens.device, selection.page_size
    width = -(-max(keys) // size)
    num_pages = (kv_lens + size - 1) // size
    return Queries(
        rows=place(rows, device),
        q_starts=torch.arange(len(rows) + 1, device=device, dtype=torch.int32),
        page_table=page_table(block_table, -(-width // pages_per_block), pages_per_block)[:, :width].contiguous(),
        num_pages=num_pages,
        kv_lens=kv_lens,
        # The last page may be unfinished, and its keys unknown to the statistics.
        forced_from=(num_pages - selection.recent_pages).clamp_min(0),
        pages_seen=pages_of(keys, size),
        pages_read=len(rows) * selection.budget_pages,
    )


def place(rows: list[int], device: torch.device) -> slice | torch.Tensor:
    """Ascending rows of a step's queries; side by side they need no index."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return to_device(rows, device)


def to_device(values: list[int], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def choose(q: torch.Tensor, rows: Queries, statistics: PageStatistics, selection: Selection) -> torch.Tensor:
    """q [B, H, D] -> [B, Hkv, budget] pages of each row, in order"""
    scores = page_scores(
        q, rows.q_starts, statistics, rows.page_table, rows.num_pages, rows.forced_from,
        selection.sink_pages, selection.lam, selection.reduce,
    )  # fmt: skip
    chosen = top_pages(scores, selection.budget_pages)
    # A query's own keys are in the last page, and vLLM's kernels take an unfinished page for the last one of their
    # table: it is forced, and should more pages be forced than may be read, it is one of them.
    chosen[..., -1] = rows.num_pages[:, None] - 1
    return chosen
