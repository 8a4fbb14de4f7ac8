"""Rows that read pages as the page kernels see them: requests of one query each."""

from dataclasses import dataclass

import torch

from vllm_dlm.plugins.selection.base import Asked, Summaries
from vllm_dlm.plugins.selection.pages import PageSelection


@dataclass
class Queries:
    """B queries; tensors on the device of the cache."""

    rows: slice | torch.Tensor  # where they are in the step's queries
    q_starts: torch.Tensor  # [B + 1]
    page_table: torch.Tensor  # [B, N] physical pages, in order
    kv_lens: torch.Tensor  # [B]
    num_pages: torch.Tensor  # [B] pages to choose from
    #: [B, N] the pages of queries that do not choose (whose num_pages are 0), and -1; None: all of them choose
    listed: torch.Tensor | None = None


def page_table(block_table: torch.Tensor, blocks_per_row: int, pages_per_block: int) -> torch.Tensor:
    """[B, n] blocks -> [B, blocks_per_row * pages_per_block] pages"""
    blocks = block_table[:, :blocks_per_row, None] * pages_per_block
    part = torch.arange(pages_per_block, device=blocks.device, dtype=blocks.dtype)
    return (blocks + part).flatten(1)


def make_queries(
    selection: PageSelection, rows: list[int], kv_lens: torch.Tensor, keys: list[int], block_table: torch.Tensor,
    pages_per_block: int,
) -> Queries:  # fmt: skip
    """`kv_lens` [B] int32 and `block_table` [B, n] on the device; `keys` is what the host knows of
    kv_lens, and bounds them."""
    device, size = kv_lens.device, selection.unit
    width = -(-max(keys) // size)
    return Queries(
        rows=place(rows, device),
        q_starts=torch.arange(len(rows) + 1, device=device, dtype=torch.int32),
        page_table=page_table(block_table, -(-width // pages_per_block), pages_per_block)[:, :width].contiguous(),
        kv_lens=kv_lens,
        num_pages=(kv_lens + size - 1) // size,
    )


def place(rows: list[int], device: torch.device) -> slice | torch.Tensor:
    """Ascending rows of a step's queries; side by side they need no index."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return to_device(rows, device)


def to_device(values: list[int], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def all_to_device(device: torch.device, *lists: list[int]) -> tuple[torch.Tensor, ...]:
    """In one piece"""
    return to_device([value for values in lists for value in values], device).split([len(values) for values in lists])


def chosen_pages(q: torch.Tensor, rows: Queries, summaries: Summaries, selection: PageSelection) -> torch.Tensor:
    """q [B, H, D] -> [B, Hkv, K] pages that each row reads, in order, and -1; no host has to wait for anything"""
    starts, ends = rows.q_starts[:-1], rows.q_starts[1:]
    asked = Asked(q, starts, ends, 1, summaries, rows.page_table, rows.num_pages)
    chosen = selection.choose(asked).units
    assert chosen is not None  # nothing is held from one position to the next
    # A query's own keys are in the last page, and vLLM's kernels take an unfinished page for the last one of their
    # table: it is forced, and should more pages be forced than may be read, it is one of them.
    chosen[..., -1] = rows.num_pages[:, None] - 1
    if rows.listed is None:
        return chosen
    # Of each row either is -1 throughout: the pages it chose, or those that are listed.
    _, heads, kept = chosen.shape
    listed = rows.listed[:, None].expand(-1, heads, -1)  # [B, Hkv, N]
    return torch.cat([torch.maximum(chosen, listed[..., :kept]), listed[..., kept:]], -1)
