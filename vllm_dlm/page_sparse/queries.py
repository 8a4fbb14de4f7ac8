"""Rows that choose pages, as requests with one query each for the page kernels."""

from dataclasses import dataclass

import torch

from vllm_dlm.kernels.packed_attention import PackedCache
from vllm_dlm.plugins.selection.base import CachedKeys, ChoiceQuery, Summaries
from vllm_dlm.plugins.selection.pages import PageSelection


@dataclass
class Queries:
    """B queries; tensors on the device of the cache."""

    rows: slice | torch.Tensor  # their rows among the step's queries
    q_starts: torch.Tensor  # [B + 1]
    page_table: torch.Tensor  # [B, N] physical pages, in order
    kv_lens: torch.Tensor  # [B]
    #: [B] number of pages to choose from. Later pages are always read: the last one, or all pages if this is 0.
    num_pages: torch.Tensor
    recent: torch.Tensor  # [B] first of the recent pages among those to choose from, which are always read
    tail: int  # upper bound on the number of pages from num_pages on


def page_table(block_table: torch.Tensor, blocks_per_row: int, pages_per_block: int) -> torch.Tensor:
    """[B, n] blocks -> [B, blocks_per_row * pages_per_block] pages"""
    blocks = block_table[:, :blocks_per_row, None] * pages_per_block
    part = torch.arange(pages_per_block, device=blocks.device, dtype=blocks.dtype)
    return (blocks + part).flatten(1)


def make_queries(
    selection: PageSelection,
    rows: list[int],
    kv_lens: torch.Tensor,
    keys: list[int],
    block_table: torch.Tensor,
    pages_per_block: int,
) -> Queries:
    """`kv_lens` [B] int32 and `block_table` [B, n] are on the device. `keys`: the host's upper bounds of kv_lens."""
    device, size = kv_lens.device, selection.unit
    width = -(-max(keys) // size)
    before_last = (kv_lens - 1) // size
    return Queries(
        rows=place(rows, device),
        q_starts=torch.arange(len(rows) + 1, device=device, dtype=torch.int32),
        page_table=page_table(block_table, -(-width // pages_per_block), pages_per_block)[:, :width].contiguous(),
        kv_lens=kv_lens,
        num_pages=before_last,
        recent=selection.recent_from(before_last),
        tail=1,
    )


def place(rows: list[int], device: torch.device) -> slice | torch.Tensor:
    """Ascending rows of a step's queries as an index; consecutive rows become a slice."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return to_device(rows, device)


def to_device(values: list[int], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def all_to_device(device: torch.device, *lists: list[int]) -> tuple[torch.Tensor, ...]:
    """Copies several lists to the device in one transfer"""
    return to_device([value for values in lists for value in values], device).split([len(values) for values in lists])


def chosen_pages(
    q: torch.Tensor,
    rows: Queries,
    summaries: Summaries,
    selection: PageSelection,
    cache: torch.Tensor | PackedCache,
) -> torch.Tensor:
    """q [B, H, D], cache [blocks, Hkv, block_size, 2 * D] -> [B, Hkv, K] pages that each row chooses, ascending, padded
    with -1. Does not synchronize with the device."""
    starts, ends = rows.q_starts[:-1], rows.q_starts[1:]
    pages_per_block = cache.shape[2] // selection.unit
    keys = CachedKeys(cache, rows.page_table[:, ::pages_per_block] // pages_per_block)
    marks = rows.page_table, rows.num_pages
    asked = ChoiceQuery(q, starts, ends, 1, summaries, *marks, recent=rows.recent, keys=keys)
    chosen = selection.choose(asked).units
    assert chosen is not None  # choices are never kept from one position to the next
    return chosen


def pages_to_read(
    q: torch.Tensor,
    rows: Queries,
    summaries: Summaries,
    selection: PageSelection,
    cache: torch.Tensor | PackedCache,
) -> torch.Tensor:
    """Pages that rows read if all of them choose: the chosen pages and the last page, [B, Hkv, K]"""
    chosen = chosen_pages(q, rows, summaries, selection, cache)
    last = rows.num_pages[:, None, None].expand(-1, chosen.shape[1], -1)
    return torch.cat([chosen, last], -1)
