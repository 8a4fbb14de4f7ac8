"""Dispatches to Triton on a GPU and to torch elsewhere."""

import torch

from vllm_dlm.kernels.operators import operator
from vllm_dlm.kernels.row_cosine import torch as plain

_row_cosine = operator(
    "row_cosine(Tensor new, Tensor old) -> Tensor",
    __package__,
    lambda new, old: new.new_empty(len(new), dtype=torch.float32),
)
_row_products = operator(
    "row_products(Tensor new, Tensor old) -> Tensor",
    __package__,
    lambda new, old: new.new_empty(3, len(new), dtype=torch.float32),
)


def row_cosine(
    new: torch.Tensor,  # [n, W], any row stride
    old: torch.Tensor,  # [n, W]
) -> torch.Tensor:
    """-> [n] float32"""
    if new.is_cuda:
        return _row_cosine(new, old)
    return plain.row_cosine(new, old)


def row_products(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """-> new · old, |new|^2 and |old|^2, [3, n] float32. With rows split across tensor-parallel ranks, these are summed
    over the ranks before the cosine is computed."""
    if new.is_cuda:
        return _row_products(new, old)
    return plain.row_products(new, old)
