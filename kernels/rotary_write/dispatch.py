"""Dispatches to Triton on a GPU and to torch elsewhere."""

import torch

from vllm_dlm.kernels.operators import operator
from vllm_dlm.kernels.packed_attention import PackedCache
from vllm_dlm.kernels.rotary_write import torch as plain

_rotary_write = operator(
    "rotary_write(Tensor? q, Tensor? k, Tensor? v, Tensor table, Tensor positions, Tensor? block, Tensor? offset, "
    "Tensor(a!)? cache, Tensor? index) -> Tensor[]",
    __package__,
    lambda q, k, *rest: [x.new_empty(x.shape) for x in (q, k) if x is not None],
)


def rotary_write(
    q: torch.Tensor | None,  # [n, H, D]; may be a view of a wider projection
    k: torch.Tensor | None,  # [n, Hkv, D]
    v: torch.Tensor | None,  # [n, Hkv, D]
    table: torch.Tensor,  # [positions, D] cosines, then sines, D / 2 each
    positions: torch.Tensor,  # [T] position of each live row
    block: torch.Tensor | None,  # [T] cache block of each live row; below 0: not cached
    offset: torch.Tensor | None,  # [T] position within the block
    cache: torch.Tensor | PackedCache | None,  # [blocks, Hkv, block_size, 2 * D], keys before values; None: no write
    index: torch.Tensor | None,  # [n] live row of each row, below 0 for padding, whose output is unspecified but finite
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """-> rotated q and k, contiguous. Writes rotated keys and values to the cache. q, k and v may each be None."""
    if table.is_cuda:
        rotated = _rotary_write(q, k, v, table, positions, block, offset, cache, index)
        return rotated[0] if q is not None else None, rotated[-1] if k is not None else None
    return plain.rotary_write(q, k, v, table, positions, block, offset, cache, index)
