"""Dispatches to Triton on a GPU and to torch elsewhere."""

import torch

from vllm_dlm.kernels.lowest_rows import torch as plain
from vllm_dlm.kernels.operators import operator

_lowest_rows = operator(
    "lowest_rows(Tensor score, Tensor forced, Tensor starts, Tensor places, int total) -> Tensor",
    __package__,
    lambda score, forced, starts, places, total: score.new_empty(total, dtype=torch.int64),
)


def lowest_rows(
    score: torch.Tensor,  # [T] float32
    forced: torch.Tensor,  # [T] bool; at most as many rows per canvas as it has places
    starts: torch.Tensor,  # [C + 1] where each canvas's rows start
    places: torch.Tensor,  # [C + 1] where each canvas's selected rows start in the result
    total: int,  # at least places[C]
) -> torch.Tensor:
    """-> [total] int64"""
    if score.is_cuda:
        return _lowest_rows(score, forced, starts, places, total)
    return plain.lowest_rows(score, forced, starts, places, total)
