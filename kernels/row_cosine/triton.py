"""One program per row reads the row of both tensors once."""

import torch
import triton
import triton.language as tl

from vllm_dlm.kernels.triton_utils import padded

#: elements of a row per tile
TILE = 2048


@triton.jit(do_not_specialize=["rows"])
def _cosine_kernel(new, old, out, rows, width, stride_new, stride_old, TILE: tl.constexpr, COSINE: tl.constexpr):
    """Stores out [rows] if COSINE, else the three sums [3, rows]"""
    row = tl.program_id(0).to(tl.int64)
    new += row * stride_new
    old += row * stride_old
    product = tl.zeros([TILE], tl.float32)
    new_square, old_square = product, product
    for start in range(0, width, TILE):
        place = start + tl.arange(0, TILE)
        a = tl.load(new + place, mask=place < width, other=0.0).to(tl.float32)
        b = tl.load(old + place, mask=place < width, other=0.0).to(tl.float32)
        product += a * b
        new_square += a * a
        old_square += b * b
    dot, new_sum, old_sum = tl.sum(product, 0), tl.sum(new_square, 0), tl.sum(old_square, 0)
    if COSINE:
        lengths = tl.maximum(tl.sqrt(new_sum), 1e-8) * tl.maximum(tl.sqrt(old_sum), 1e-8)
        tl.store(out + row, dot / lengths)
    else:
        tl.store(out + row, dot)
        tl.store(out + rows + row, new_sum)
        tl.store(out + 2 * rows + row, old_sum)


def _launch(new, old, cosine):
    count, width = new.shape
    out = torch.empty((count,) if cosine else (3, count), dtype=torch.float32, device=new.device)
    if count:
        _cosine_kernel[count,](
            new,
            old,
            out,
            count,
            width,
            new.stride(0),
            old.stride(0),
            TILE=min(padded(width, 128), TILE),
            COSINE=cosine,
            num_warps=4,
        )
    return out


def row_cosine(new, old):
    """See dispatch.py"""
    return _launch(new, old, True)


def row_products(new, old):
    """See dispatch.py"""
    return _launch(new, old, False)
