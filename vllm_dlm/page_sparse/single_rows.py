"""Metadata for steps with one row per request, in persistent buffers, because captured CUDA graphs read them.

vLLM replays such a graph for any step of single rows, without another
decision of the backend. This includes contexts too short to leave anything
out, and the last token of a prompt, which always reads everything. All rows
therefore use the page kernels. A row that does not choose has no pages to
choose from, so all of its pages are read. The tables are as wide as the longest
context; entries that a row does not read cost nothing. vLLM pads such a step
with dummy requests without keys, which read nothing.
"""

import torch

from vllm_dlm.page_sparse.queries import Queries, to_device
from vllm_dlm.page_sparse.queries import page_table as pages_of_blocks
from vllm_dlm.plugins.selection.pages import PageSelection


class SingleRows:
    def __init__(
        self, selection: PageSelection, requests: int, longest: int, pages_per_block: int, device: torch.device
    ):
        """`requests`: maximum number of requests; `longest`: maximum number of keys of a request."""
        self.selection, self.size, self.pages_per_block = selection, selection.unit, pages_per_block
        self.blocks = -(-longest // (self.size * pages_per_block))  # maximum per request
        self.width = self.blocks * pages_per_block
        self.q_starts = torch.arange(requests + 1, dtype=torch.int32, device=device)
        self.page_table = torch.zeros(requests, self.width, dtype=torch.int32, device=device)
        self.kv_lens = torch.zeros(requests, dtype=torch.int32, device=device)
        self.num_pages = torch.zeros_like(self.kv_lens)
        self.recent = torch.zeros_like(self.kv_lens)
        self.full_pages = torch.full((requests,), -1, dtype=torch.int64, device=device)

    def fill(self, common, choosing: set[int]) -> tuple[Queries, torch.Tensor]:
        """Fills the buffers for a step -> its queries, and the pages [B] that its rows complete. `choosing`: requests
        whose rows choose. Everything else is computed on the device from lengths that the host need not know."""
        count, size = common.num_reqs, self.size
        page_table, full_pages = self.page_table[:count], self.full_pages[:count]
        kv_lens, num_pages, recent = self.kv_lens[:count], self.num_pages[:count], self.recent[:count]
        chooses = to_device([b in choosing for b in range(count)], self.page_table.device, torch.int32)  # [B]
        kv_lens.copy_(common.seq_lens[:count])
        num_pages.copy_((kv_lens - 1) // size * chooses)
        recent.copy_(self.selection.recent_from(num_pages))
        page_table.copy_(pages_of_blocks(common.block_table_tensor[:count], self.blocks, self.pages_per_block))
        full_pages.copy_(ended_pages(common.slot_mapping[:count], size))
        rows = Queries(
            slice(count), self.q_starts[: count + 1], page_table, kv_lens, num_pages, recent, tail=self.width
        )
        return rows, full_pages


def ended_pages(slots: torch.Tensor, size: int) -> torch.Tensor:
    """For each slot, the page whose last position it is, or -1"""
    return torch.where((slots >= 0) & (slots % size == size - 1), slots // size, -1)
