"""The kernels of a denoising step against their definitions, on the CPU and under Triton's interpreter; run by
test_triton_interpreter.py."""

import pytest
import torch

from tests.kernels.interpreted import *  # noqa: F403
from tests.kernels.interpreted import on_gpu
from tests.kernels.step_inputs import LiveRows, heads
from vllm_dlm.kernels.rotary_write import naive as naive_rotary
from vllm_dlm.kernels.rotary_write import rotary_write

DEVICES = [pytest.param(lambda x: x, id="cpu"), pytest.param(on_gpu, id="gpu")]
pytestmark = pytest.mark.parametrize("on", DEVICES)


@pytest.mark.parametrize("given, named", [("qkv", True), ("qkv", False), ("kv", True), ("q", False), ("v", True)])
@pytest.mark.parametrize(
    "q_heads, kv_heads, dim, dtype, exact, names",
    [
        (4, 4, 64, torch.float32, torch.float32, torch.int64),
        (6, 2, 80, torch.bfloat16, torch.float32, torch.int32),
        (17, 3, 128, torch.bfloat16, torch.bfloat16, torch.int64),  # several parts of heads, the last with one
        (2, 1, 64, torch.float32, torch.bfloat16, torch.int32),
    ],
)
def test_rotary_write(on, given, named, q_heads, kv_heads, dim, dtype, exact, names):
    rows = LiveRows.random(kv_heads, dim, dtype, names=names)
    index = rows.index if named else None
    count = len(rows.index if named else rows.block)
    together = heads(count, q_heads + 2 * kv_heads, dim, dtype=dtype)
    q, k, v = together.split((q_heads, kv_heads, kv_heads), 1)
    table = heads(50, dim, dtype=exact)
    inputs = [x if name in given else None for name, x in zip("qkv", (q, k, v), strict=True)]
    cache, wanted_cache = rows.cache.clone(), rows.cache.clone()
    places = rows.positions, rows.block, rows.offset
    got = rotary_write(*inputs, on(table), *places, cache, index)
    wanted = naive_rotary.rotary_write(*inputs, table, *places, wanted_cache, index)
    kept = torch.ones(count, dtype=torch.bool) if index is None else index >= 0
    for x, y, name in zip(got, wanted, "qk", strict=True):
        assert (x is None) == (name not in given)
        if x is not None:
            assert x.is_contiguous() and x.isfinite().all() and torch.equal(x[kept], y[kept])
    assert torch.equal(cache, wanted_cache)
    assert torch.equal(cache, rows.cache) == (given == "q")


def test_rotary_of_an_uncached_canvas(on):
    q, k, table = heads(5, 2, 64), heads(5, 2, 64, seed=2), heads(9, 64, seed=3)
    positions = torch.arange(5) + 2
    arguments = positions, None, None, None, None
    got = rotary_write(q, k, None, on(table), *arguments)
    for x, y in zip(got, naive_rotary.rotary_write(q, k, None, table, *arguments), strict=True):
        assert torch.equal(x, y)


def test_rotary_of_no_rows(on):
    rows = LiveRows.random()
    empty = heads(0, 2, 64)
    q, k = rotary_write(
        empty, empty, empty, on(heads(50, 64)), rows.positions, rows.block, rows.offset, rows.cache, rows.index[:0]
    )
    assert q.shape == k.shape == empty.shape


def test_rotary_into_a_cache_with_other_strides(on):
    """Heads beside each other, as some engines keep them."""
    rows = LiveRows.random(kv_heads=3)
    k, v, table = heads(7, 3, 64), heads(7, 3, 64, seed=2), heads(50, 64, seed=3)
    places = rows.positions, rows.block, rows.offset
    cache, wanted = rows.cache.transpose(1, 2).contiguous().transpose(1, 2), rows.cache.clone()
    rotary_write(None, k, v, on(table), *places, cache, rows.index)
    naive_rotary.rotary_write(None, k, v, table, *places, wanted, rows.index)
    assert torch.equal(cache, wanted)
