"""Which implementation runs."""

import torch

from vllm_dlm.kernels.operators import operator
from vllm_dlm.kernels.rotary_write import torch as plain

_rotary_write = operator(
    "rotary_write(Tensor? q, Tensor? k, Tensor? v, Tensor table, Tensor positions, Tensor? block, Tensor? offset, "
    "Tensor(a!)? cache, Tensor? index) -> Tensor[]",
    __package__,
    lambda q, k, *rest: [x.new_empty(x.shape) for x in (q, k) if x is not None],
)


def rotary_write(
    q: torch.Tensor | None,  # [n, H, D]; may be a view of a product that is wider
    k: torch.Tensor | None,  # [n, Hkv, D]
    v: torch.Tensor | None,  # [n, Hkv, D]
    table: torch.Tensor,  # [positions, D] cosines, then sines, D / 2 each
    positions: torch.Tensor,  # [T] of each live row
    block: torch.Tensor | None,  # [T] where each lies in the cache; below 0: nowhere
    offset: torch.Tensor | None,  # [T]
    cache: torch.Tensor | None,  # [blocks, Hkv, block_size, 2 * D], keys before values; None: nothing is written
    index: torch.Tensor | None,  # [n] live row of each row, below 0 for padding, whose output is any finite number
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """-> rotated q and k, contiguous. Writes rotated keys and values, of each what is given, to the cache."""
    if table.is_cuda:
        rotated = _rotary_write(q, k, v, table, positions, block, offset, cache, index)
        return rotated[0] if q is not None else None, rotated[-1] if k is not None else None
    return plain.rotary_write(q, k, v, table, positions, block, offset, cache, index)
