"""What the Triton kernels share: products, the rows of a request, sizes of grids.

The kernels work on rows: the queries of a request times the `GROUP` heads that
share a key head, so that all of them use a key once it is read. Row r of a
request is head r % GROUP of its query r // GROUP.

Everything a launcher decides follows from shapes alone: no value is fetched
from the device, and a captured graph can be replayed with other contents.
"""

import functools

import torch
import triton
import triton.language as tl

#: The interpreter (TRITON_INTERPRET=1) multiplies bfloat16 wrongly: products take float32 there.
UPCAST = tl.constexpr(bool(triton.knobs.runtime.interpret))
#: multiprocessors that are assumed where there is no device to ask
PROCESSORS = 132


def padded(size: int, least: int = 1) -> int:
    """The next power of two, the only extents a block can have."""
    return max(least, triton.next_power_of_2(size))


@functools.cache
def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def row_tile(queries: int, batch: int, group: int, most: int) -> int:
    """Rows of a tile, for requests that have about equally many queries; never below what a product needs."""
    return min(padded(triton.cdiv(queries, max(batch, 1)) * group, 16), most)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32, without rounding float32 operands to fewer bits"""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def live_row(index, i):
    """The live row of row i, below 0 if that is padding"""
    row = i if index is None else tl.load(index + i)
    return row.to(tl.int64)


@triton.jit
def row_offsets(first, row, h, stride_token, stride_head, GROUP: tl.constexpr):
    """Where the rows `row` [R] of the request whose queries start at `first` lie in a tensor [Tq, H, …]: [R] int64"""
    return (first + row // GROUP).to(tl.int64) * stride_token + (h * GROUP + row % GROUP) * stride_head


@triton.jit
def load_rows(q, offsets, there, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """[R, DIM_PAD], zero in rows that are not there and in channels beyond DIM"""
    channel = tl.arange(0, DIM_PAD)
    return tl.load(q + offsets[:, None] + channel[None, :], mask=there[:, None] & (channel < DIM)[None, :], other=0.0)
