"""Helpers shared by the Triton kernels: products, rows of a request, grid sizes.

The kernels work on rows: the queries of a request times the `GROUP` heads that
share a key head, so that a key is read once for all of them. Row r of a request
is head r % GROUP of its query r // GROUP.

Launchers decide from shapes alone. They fetch no value from the device, so a
captured CUDA graph can be replayed with other contents.
"""

import functools

import torch
import triton
import triton.language as tl

#: the interpreter (TRITON_INTERPRET=1) multiplies bfloat16 wrongly, so products use float32 there
UPCAST = tl.constexpr(bool(triton.knobs.runtime.interpret))
#: number of multiprocessors assumed without a CUDA device
PROCESSORS = 132


def padded(size: int, least: int = 1) -> int:
    """The next power of two, at least `least`. Triton blocks can have no other extents."""
    return max(least, triton.next_power_of_2(size))


@functools.cache
def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def row_tile(queries: int, batch: int, group: int, most: int) -> int:
    """Rows per tile for requests with about equal numbers of queries; at least 16, the minimum of tl.dot."""
    return min(padded(triton.cdiv(queries, max(batch, 1)) * group, 16), most)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32, without rounding float32 operands to TF32"""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def live_row(index, i):
    """Live row of row i, below 0 for padding"""
    row = i if index is None else tl.load(index + i)
    return row.to(tl.int64)


@triton.jit
def row_offsets(first, row, h, stride_token, stride_head, GROUP: tl.constexpr):
    """Offsets [R] int64 of rows `row` [R] in a tensor [Tq, H, …], for the request whose queries start at `first`"""
    return (first + row // GROUP).to(tl.int64) * stride_token + (h * GROUP + row % GROUP) * stride_head


@triton.jit
def load_rows(q, offsets, there, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """Loads rows [R, DIM_PAD]; zero for rows that are not there and channels beyond DIM"""
    channel = tl.arange(0, DIM_PAD)
    return tl.load(q + offsets[:, None] + channel[None, :], mask=there[:, None] & (channel < DIM)[None, :], other=0.0)
