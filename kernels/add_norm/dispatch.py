"""Dispatches to Triton on GPUs, and to vLLM's kernel on CPUs if there is one, otherwise to torch."""

import torch

from vllm_dlm.kernels.add_norm import torch as plain
from vllm_dlm.kernels.add_norm import vllm as on_cpu
from vllm_dlm.kernels.operators import operator

_add_norm = operator(
    "add_norm(Tensor x, Tensor added, Tensor weight, float eps) -> Tensor",
    __package__,
    lambda x, added, weight, eps: x.new_empty(2, *x.shape),
)


def add_norm(x: torch.Tensor, added: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x and added [n, E], weight [E] -> [2, n, E]: the normalized sum, and the sum"""
    if x.is_cuda:
        return _add_norm(x, added, weight, eps)
    if on_cpu.runs(x, weight):
        return on_cpu.add_norm(x, added, weight, eps)
    return plain.add_norm(x, added, weight, eps)
