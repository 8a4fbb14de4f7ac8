"""The gate: which pages a query may choose from, how many of them it keeps, and which queries choose together.

The geometry is that of serving:
- A causal query at position t sees t // P + 1 pages, as in decoding.
- A bidirectional query of the response chooses among the whole pages of the
  prompt, together with the other queries of its block. It always reads the
  response.
- Queries of the prompt read everything, as a prefill does.
- A bidirectional sequence without a prompt has no counterpart in serving. Its
  queries choose among all whole pages and must read those around their own.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

#: maximum number of query rows with separate choices that are computed together
ROWS = 128


@dataclass(frozen=True)
class Gate:
    page_size: int
    budget_pages: int  # pages read per query and key head, including sink and recent pages
    lam: float = 0.5
    std_kind: str = "l2"
    reduce: str = "max"
    sink_pages: int = 1
    recent_pages: int = 2
    min_context: int = 0  # shorter contexts are read completely
    temperature: float = 1.0  # 0: the hard mask
    stop_threshold: bool = True  # no gradient through the threshold
    causal: bool = True
    query_block: int = 0  # number of bidirectional queries that choose together; 0: all of the response

    @property
    def hard(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class Rows:
    """Queries at positions start … stop - 1. `together`: they share one choice. `dense`: they read everything."""

    start: int
    stop: int
    together: bool = False
    dense: bool = False

    def __len__(self) -> int:
        return self.stop - self.start


def parts(gate: Gate, first: int, keys: int, prompt_len: int, rows: int = ROWS) -> Iterator[Rows]:
    """Splits queries first … keys - 1 of a sequence into pieces that do not cut queries which choose together."""
    whole = binding_from(gate, keys, prompt_len)
    if first < whole:
        yield Rows(first, min(whole, keys), dense=True)
    start = max(first, whole)
    if gate.causal:
        for begin in range(start, keys, rows):
            yield Rows(begin, min(begin + rows, keys))
        return
    block = gate.query_block or (keys if prompt_len else gate.page_size)
    while start < keys:  # blocks are aligned to the start of the response
        stop = min(keys, start + block - (start - prompt_len) % block)
        yield Rows(start, stop, together=True)
        start = stop


def binding_from(gate: Gate, keys: int, prompt_len: int) -> int:
    """Position of the first query that sees more pages than its budget; earlier queries read everything."""
    if gate.causal:
        return max(prompt_len, gate.min_context - 1, gate.budget_pages * gate.page_size)
    pages = prompt_len // gate.page_size if prompt_len else -(-keys // gate.page_size)
    return prompt_len if keys >= gate.min_context and pages > gate.budget_pages else keys


def choices(gate: Gate, rows: Rows, keys: int, prompt_len: int, device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """-> choosable [R, N // P] bool, and keep [R]: how many choosable pages the budget leaves room for. R: one row per
    query, or one row for all queries that choose together."""
    size, page = gate.page_size, torch.arange(keys // gate.page_size, device=device)
    if gate.causal:
        pages = torch.arange(rows.start, rows.stop, device=device)[:, None] // size + 1  # [R, 1] that the query sees
        choosable = page < pages - gate.recent_pages
    elif prompt_len:
        pages = torch.full((1, 1), prompt_len // size, device=device)
        choosable = (page < -(-prompt_len // size) - gate.recent_pages)[None]
    else:
        pages = torch.full((1, 1), -(-keys // size), device=device)
        before, after = rows.start // size - gate.recent_pages, (rows.stop - 1) // size + gate.recent_pages
        choosable = ((page <= before) | (page >= after))[None]
    choosable = choosable & (page >= gate.sink_pages)
    keep = gate.budget_pages - (pages[:, 0] - choosable.sum(-1))
    return choosable, keep.clamp_min(0)


def threshold(scores: torch.Tensor, choosable: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """scores [..., R, pages] -> tau [..., R], halfway between the lowest score kept and the highest score not kept"""
    scores = scores.masked_fill(~choosable, -torch.inf)
    width = min(int(keep.max()) + 1, scores.shape[-1])
    best = scores.topk(width, -1)[0]
    keep = keep.expand(best.shape[:-1])[..., None]
    last = best.gather(-1, (keep - 1).clamp(0, width - 1))[..., 0]
    following = best.gather(-1, keep.clamp_max(width - 1))[..., 0]
    keep, count = keep[..., 0], choosable.sum(-1)
    tau = torch.where(keep == 0, torch.inf, (last + following) / 2)
    return torch.where(keep >= count, -torch.inf, tau)
