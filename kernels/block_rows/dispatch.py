"""Dispatches to Triton on a GPU and to torch elsewhere."""

import torch

from vllm_dlm.kernels.block_rows import torch as plain
from vllm_dlm.kernels.operators import operator
from vllm_dlm.kernels.packed_attention import PackedCache


def _count(block, index):
    return len(block if index is None else index)


_read_rows = operator(
    "read_rows(Tensor cache, int width, Tensor block, Tensor offset, Tensor? index) -> Tensor",
    __package__,
    lambda cache, width, block, offset, index: cache.new_empty(_count(block, index), width),
)
_write_rows = operator(
    "write_rows(Tensor(a!) cache, Tensor block, Tensor offset, Tensor values, Tensor? index) -> ()",
    __package__,
    lambda *args: None,
)
_read_values = operator(
    "read_values(Tensor cache, Tensor block, Tensor offset, Tensor? index) -> Tensor",
    __package__,
    lambda cache, block, offset, index: cache.new_empty(_count(block, index), cache.shape[1], cache.shape[3] // 2),
)


def read_rows(
    cache: torch.Tensor,  # [blocks, Hkv, block_size, 2 * D], each block contiguous
    width: int,
    block: torch.Tensor,  # [T]
    offset: torch.Tensor,  # [T] row within the block
    index: torch.Tensor | None,  # [n] live row of each row
) -> torch.Tensor:
    """-> [n, width]"""
    if cache.is_cuda:
        return _read_rows(cache, width, block, offset, index)
    return plain.read_rows(cache, width, block, offset, index)


def write_rows(
    cache: torch.Tensor,
    block: torch.Tensor,
    offset: torch.Tensor,
    values: torch.Tensor,  # [n, width], any row stride
    index: torch.Tensor | None,
) -> None:
    if cache.is_cuda:
        return _write_rows(cache, block, offset, values, index)
    return plain.write_rows(cache, block, offset, values, index)


def read_values(
    cache: torch.Tensor | PackedCache,  # [blocks, Hkv, block_size, 2 * D], any strides
    block: torch.Tensor,  # [T]
    offset: torch.Tensor,  # [T] position within the block
    index: torch.Tensor | None,
) -> torch.Tensor:
    """The values of cached positions -> [n, Hkv, D]"""
    if cache.is_cuda:
        return _read_values(cache, block, offset, index)
    return plain.read_values(cache, block, offset, index)


def read_keys(cache: torch.Tensor | PackedCache, block: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Keys of n positions with slots -> [n, Hkv, D]"""
    return plain.read_keys(cache, block, offset)
