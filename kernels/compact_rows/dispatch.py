"""Dispatches to Triton on a GPU and to torch elsewhere."""

import torch

from vllm_dlm.kernels.compact_rows import torch as plain
from vllm_dlm.kernels.operators import operator


def _fake(mask, starts, capacity):
    counts = mask.new_empty(0 if starts is None else len(starts), dtype=torch.int32)
    return mask.new_empty(capacity, dtype=torch.int64), counts


_compact_rows = operator(
    "compact_rows(Tensor mask, Tensor? starts, int capacity) -> (Tensor, Tensor)", __package__, _fake
)


def compact_rows(
    mask: torch.Tensor,  # [T] bool
    starts: torch.Tensor | None,  # [C + 1] where each canvas's rows start; rows from starts[C] on are padding
    capacity: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """-> marked rows [capacity] int64, ascending, and where each canvas's rows start in that list, [C + 1] int32"""
    run = _compact_rows if mask.is_cuda else plain.compact_rows
    index, counts = run(mask, starts, capacity)
    return index, None if starts is None else counts
