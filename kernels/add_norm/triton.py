"""One program per row, which stays in registers between the sum and the normalization."""

import torch
import triton
import triton.language as tl

from vllm_dlm.kernels.triton_utils import padded


@triton.jit(do_not_specialize=["rows"])
def _add_norm_kernel(x, added, weight, out, eps, rows, width, stride_x, stride_added, WIDTH_PAD: tl.constexpr):
    """x and added [rows, width] -> out [2, rows, width]"""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, WIDTH_PAD)
    mask = channel < width
    total = tl.load(x + row * stride_x + channel, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(added + row * stride_added + channel, mask=mask, other=0.0).to(tl.float32)
    total = total.to(out.dtype.element_ty)  # round to the dtype of the residual stream
    tl.store(out + (rows + row) * width + channel, total, mask=mask)
    precise = total.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(precise * precise, 0) / width + eps)
    normed = precise * scale * tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * width + channel, normed.to(out.dtype.element_ty), mask=mask)


def add_norm(x, added, weight, eps):
    """See dispatch.py"""
    rows, width = x.shape
    out = torch.empty(2, rows, width, dtype=x.dtype, device=x.device)
    if rows:
        _add_norm_kernel[(rows,)](
            x,
            added,
            weight,
            out,
            eps,
            rows,
            width,
            x.stride(0),
            added.stride(0),
            WIDTH_PAD=padded(width, 128),
            num_warps=8 if width > 2048 else 4,
        )
    return out
