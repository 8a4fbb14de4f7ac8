"""Dispatches to Triton on a GPU and to torch elsewhere."""

from typing import NamedTuple

import torch

from vllm_dlm.kernels.head_statistics import torch as plain
from vllm_dlm.kernels.operators import operator


class HeadStatistics(NamedTuple):
    """[R] each"""

    token: torch.Tensor  # int64
    prob: torch.Tensor  # float32, NaN if a logit of the row is NaN or +inf
    margin: torch.Tensor
    logsumexp: torch.Tensor
    entropy: torch.Tensor  # sum p log(p + 1e-10); empty unless requested


def _fake(logits, mask_id, eos_id, eot_id, suppress_eos, unlikely_ends, entropy):
    rows = logits.shape[0]
    numbers = [logits.new_empty(rows, dtype=torch.float32) for _ in range(3)]
    return (
        logits.new_empty(rows, dtype=torch.int64),
        *numbers,
        logits.new_empty(rows if entropy else 0, dtype=torch.float32),
    )


_head_statistics = operator(
    "head_statistics(Tensor logits, int mask_id, int eos_id, int eot_id, Tensor? suppress_eos, Tensor? unlikely_ends, "
    "bool entropy) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    __package__,
    _fake,
)


def head_statistics(
    logits: torch.Tensor,  # [R, V], any row stride
    mask_id: int,
    eos_id: int = -1,
    eot_id: int | None = None,
    suppress_eos: torch.Tensor | None = None,  # [R] bool
    unlikely_ends: torch.Tensor | None = None,  # [R] bool
    entropy: bool = False,
) -> HeadStatistics:
    """Statistics of each row of logits; ties go to the lowest token id."""
    run = _head_statistics if logits.is_cuda else plain.head_statistics
    eot_id = -1 if eot_id is None else eot_id
    return HeadStatistics(*run(logits, mask_id, eos_id, eot_id, suppress_eos, unlikely_ends, entropy))
