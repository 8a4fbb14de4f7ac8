"""The kernels of a denoising step against their definitions, on the CPU and with Triton's interpreter; run by
test_triton_interpreter.py."""

import pytest
import torch

from tests.kernels.devices import on_gpu
from tests.kernels.interpreted import *  # noqa: F403
from tests.kernels.step_inputs import LiveRows, heads
from vllm_dlm.kernels.block_rows import naive as naive_rows
from vllm_dlm.kernels.block_rows import read_rows, read_values, write_rows
from vllm_dlm.kernels.lowest_rows import lowest_rows
from vllm_dlm.kernels.lowest_rows import naive as naive_lowest
from vllm_dlm.kernels.lowest_rows import triton as triton_lowest
from vllm_dlm.kernels.rotary_write import naive as naive_rotary
from vllm_dlm.kernels.rotary_write import rotary_write
from vllm_dlm.kernels.row_cosine import naive as naive_cosine
from vllm_dlm.kernels.row_cosine import row_cosine, row_products

DEVICES = [pytest.param(lambda x: x, id="cpu"), pytest.param(on_gpu, id="gpu")]
pytestmark = pytest.mark.parametrize("on", DEVICES)


NARROW = (4, 4, 64, torch.float32, torch.float32, torch.int64)
ODD = (6, 2, 80, torch.bfloat16, torch.float32, torch.int32)
PARTS = (17, 3, 128, torch.bfloat16, torch.bfloat16, torch.int64)  # of heads, the last with one
COARSE = (2, 1, 64, torch.float32, torch.bfloat16, torch.int32)


@pytest.mark.parametrize(
    "q_heads, kv_heads, dim, dtype, exact, names, given, named",
    [
        (*NARROW, "qkv", False),
        (*NARROW, "kv", True),
        (*ODD, "qkv", True),
        (*ODD, "v", True),
        (*PARTS, "qkv", True),
        (*PARTS, "q", False),
        (*COARSE, "qkv", False),
    ],
)
def test_rotary_write(on, q_heads, kv_heads, dim, dtype, exact, names, given, named):
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
    """A cache that stores the heads of a position next to each other."""
    rows = LiveRows.random(kv_heads=3)
    k, v, table = heads(7, 3, 64), heads(7, 3, 64, seed=2), heads(50, 64, seed=3)
    places = rows.positions, rows.block, rows.offset
    cache, wanted = rows.cache.transpose(1, 2).contiguous().transpose(1, 2), rows.cache.clone()
    rotary_write(None, k, v, on(table), *places, cache, rows.index)
    naive_rotary.rotary_write(None, k, v, table, *places, wanted, rows.index)
    assert torch.equal(cache, wanted)


def canvases(sizes, budgets, spare_rows=3, spare_places=2, names=torch.int64):
    g = torch.Generator().manual_seed(sum(sizes))
    starts, places = (torch.tensor([0, *counts]).cumsum(0).to(names) for counts in (sizes, budgets))
    rows = sum(sizes) + spare_rows
    score, forced = torch.randn(rows, generator=g), torch.zeros(rows, dtype=torch.bool)
    for first, size, budget in zip(starts.tolist(), sizes, budgets, strict=False):
        forced[first + torch.randperm(size, generator=g)[: min(budget, size) // 2]] = True
    return score, forced, starts, places, int(places[-1]) + spare_places


def compare_lowest(on, score, *rest):
    assert torch.equal(lowest_rows(on(score), *rest), naive_lowest.lowest_rows(score, *rest))


@pytest.mark.parametrize(
    "sizes, budgets, names",
    [
        ((40, 1, 0, 150), (7, 1, 0, 149), torch.int64),
        ((8, 5, 3), (0, 5, 6), torch.int32),  # no places, as many places as rows, and more places than rows
        ((), (), torch.int64),
    ],
)
def test_lowest_rows(on, sizes, budgets, names):
    compare_lowest(on, *canvases(sizes, budgets, names=names))


def test_lowest_rows_that_tie_or_are_no_numbers(on):
    score, *rest = canvases((30, 60, 20), (12, 31, 18), spare_rows=0, spare_places=0)
    score[:30] = score[:30].round()
    score[:30:3], score[1:30:3] = 0.0, -0.0
    score[30:50] = torch.tensor([torch.inf, -torch.inf, torch.nan, -torch.nan]).repeat(5)
    score[90:], rest[0][90:] = torch.nan, False
    score[95] = torch.inf
    compare_lowest(on, score, *rest)
    score[:] = 1.0
    compare_lowest(on, score, *rest)
    score[::2] = -torch.inf
    compare_lowest(on, score, *rest)


def test_lowest_rows_of_canvases_longer_than_a_tile(on, monkeypatch):
    monkeypatch.setattr(triton_lowest, "TILE", 128)
    score, *rest = canvases((300, 130), (150, 20))
    compare_lowest(on, score.round(decimals=1), *rest)


@pytest.mark.parametrize(
    "width, dtype, tolerance", [(300, torch.float32, 1e-6), (96, torch.bfloat16, 1e-6), (4500, torch.float16, 1e-6)]
)
def test_cosines(on, width, dtype, tolerance):
    new = heads(5, 2, width, dtype=dtype)[:, 1]  # not contiguous
    old = (new + heads(5, width, dtype=dtype, seed=2)).contiguous()
    old[1], old[2] = 0.0, new[2]
    got, wanted = row_cosine(on(new), old), naive_cosine.row_cosine(new, old)
    torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=0)
    assert got[1] == 0
    torch.testing.assert_close(
        row_products(on(new), old).double(), naive_cosine.row_products(new, old), rtol=1e-5, atol=1e-3
    )


def test_cosines_of_no_rows(on):
    empty = torch.zeros(0, 64)
    assert row_cosine(on(empty), empty).shape == (0,) and row_products(on(empty), empty).shape == (3, 0)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    "width, dtype, names", [(256, torch.float32, torch.int64), (3000, torch.bfloat16, torch.int32)]
)
def test_rows_in_blocks(on, width, dtype, names, named):
    """Width 3,000 leaves the end of a block unused and takes two programs per row."""
    rows = LiveRows.random(kv_heads=3, dim=64, dtype=dtype, names=names)
    rows.offset %= rows.cache[0].numel() // width
    if width > 256:  # no two rows write to the same place
        rows.block, rows.offset = torch.arange(11).to(names) // 2 - 1, torch.arange(11).to(names) % 2
        rows.cache = heads(5, 3, 16, 128, dtype=dtype)
    index = rows.index if named else None
    places = rows.block, rows.offset
    got = read_rows(on(rows.cache), width, *places, index)
    assert torch.equal(got, naive_rows.read_rows(rows.cache, width, *places, index))
    values = heads(len(got), 2, width, dtype=dtype, seed=3)[:, 0]
    cache, wanted = rows.cache.clone(), rows.cache.clone()
    write_rows(on(cache), *places, values, index)
    naive_rows.write_rows(wanted, *places, values, index)
    assert torch.equal(cache, wanted) and not torch.equal(cache, rows.cache)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("kv_heads, dim, dtype", [(3, 80, torch.float32), (20, 128, torch.bfloat16)])
def test_values_of_rows(on, kv_heads, dim, dtype, named):
    rows = LiveRows.random(kv_heads, dim, dtype)
    cache = rows.cache.transpose(1, 2).contiguous().transpose(1, 2)
    arguments = rows.block, rows.offset, rows.index if named else None
    assert torch.equal(read_values(on(cache), *arguments), naive_rows.read_values(cache, *arguments))
