"""Attention over caches in the layout of vLLM's CPU kernel, against its definition in float64."""

from dataclasses import replace

import pytest
import torch

from vllm_dlm.kernels.block_rows import read_keys, read_values
from vllm_dlm.kernels.packed_attention import PackedCache, naive, packed_attention, plan, read_key_runs, read_runs
from vllm_dlm.kernels.packed_attention.dispatch import layout_of
from vllm_dlm.kernels.paged_attention import paged_attention
from vllm_dlm.kernels.rotary_write import rotary_write

SHAPES = [(4, 4, 32, 32), (8, 2, 64, 128), (7, 1, 80, 32), (6, 6, 64, 64)]  # H, Hkv, D, block
LENGTHS = [([1], [1]), ([5, 0, 20], [33, 64, 100]), ([70, 3], [70, 200]), ([9, 9, 9], [31, 32, 160])]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # of results that are rounded to the dtype


@pytest.fixture(params=["as it is", "number by number"])
def scattered(request, monkeypatch):
    """Both ways to read: by views where the order allows them, and by an index per number."""
    return request.param == "number by number"


def packed(kv_lens, kv_heads, dim, size, dtype, scattered=False, seed=0):
    """-> the cache, keys and values [Hkv, N, D] of each sequence, and the tables, blocks in shuffled order. Memory that
    belongs to none is NaN but for values within 32 positions of an end, which the kernel multiplies by 0."""
    generator = torch.Generator().manual_seed(seed)
    layout = layout_of(dtype, size, dim)
    assert layout is not None
    needed = [-(-n // size) for n in kv_lens]
    free = torch.randperm(sum(needed) + 2, generator=generator)
    cache = PackedCache(torch.full((len(free), kv_heads, size, 2 * dim), torch.nan, dtype=dtype), layout)
    if scattered:
        cache.layout = replace(layout, columns=False, rows=False)
    tables = torch.zeros(len(kv_lens), max(needed), dtype=torch.int32)
    given = []
    for number, (table, length) in enumerate(zip(free[: sum(needed)].split(needed), kv_lens, strict=True)):
        tables[number, : len(table)] = table
        k, v = (torch.randn(length, kv_heads, dim, generator=generator).to(dtype) for _ in range(2))
        place = torch.arange(-(-length // 32) * 32)
        zero = torch.zeros(len(place), kv_heads, dim, dtype=dtype)
        cache.write(zero * torch.nan, zero, table[place // size], place % size)
        cache.write(k, v, table[place[:length] // size], place[:length] % size)
        given.append((k, v, table))
    return cache, given, tables


def queries(count, heads, dim, dtype, seed=1):
    return torch.randn(count, heads, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "size"), SHAPES)
@pytest.mark.parametrize(("q_lens", "kv_lens"), LENGTHS)
def test_equals_its_definition(heads, kv_heads, dim, size, q_lens, kv_lens, dtype):
    cache, given, tables = packed(kv_lens, kv_heads, dim, size, dtype)
    moved, _, _ = packed(kv_lens, kv_heads, dim, size, dtype)
    for k, v, table in given:
        place = torch.arange(len(k))
        moved.write(None, v + 1, table[place // size], place % size)
    q, scale = queries(sum(q_lens), heads, dim, dtype), dim**-0.5
    for values in (cache, moved):
        got = packed_attention(q, cache, values, plan(cache, heads, q_lens, kv_lens, tables), scale)
        own, tolerance = [table for _, _, table in given], {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
        wanted = naive.packed_attention(q, cache, values, q_lens, kv_lens, own, scale)
        torch.testing.assert_close(got, wanted, **tolerance)
        if values is cache:
            torch.testing.assert_close(paged_attention(q, cache, own, q_lens, kv_lens, scale), wanted, **tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "size"), SHAPES)
def test_a_row_does_not_depend_on_what_else_is_in_the_call(heads, kv_heads, dim, size, dtype):
    """Nor on the tile it is in; 5,000 keys are more than one piece of them"""
    kv_lens, counts = [5000, 40, 333], [41, 3, 26]
    cache, _, tables = packed(kv_lens, kv_heads, dim, size, dtype)
    q = queries(sum(counts), heads, dim, dtype)
    together = packed_attention(q, cache, cache, plan(cache, heads, counts, kv_lens, tables), dim**-0.5)
    for number, (own, context) in enumerate(zip(q.split(counts), together.split(counts), strict=True)):
        for rows in (slice(None), slice(1, None), slice(2, 3), slice(None, None, 2)):
            few = own[rows].contiguous()
            alone = plan(cache, heads, [len(few)], kv_lens[number : number + 1], tables[number : number + 1])
            assert torch.equal(packed_attention(few, cache, cache, alone, dim**-0.5), context[rows])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_row_does_not_depend_on_the_number_of_threads(dtype):
    kv_lens, counts = [900, 40, 333], [41, 3, 130]
    cache, _, tables = packed(kv_lens, 4, 64, 32, dtype)
    q, found, before = queries(sum(counts), 4, 64, dtype), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(packed_attention(q, cache, cache, plan(cache, 4, counts, kv_lens, tables), 0.125))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("size", "length"), [(32, 32), (32, 1), (64, 16), (128, 32), (128, 2)])
def test_what_is_written_is_read_back(scattered, size, length, dtype):
    kv_heads, dim, count = 3, 64, 4 * size
    cache, ((k, v, table),), _ = packed([count], kv_heads, dim, size, dtype, scattered)
    place = torch.randperm(count)[:50]
    block, offset = table[place // size], place % size
    assert torch.equal(read_keys(cache, block, offset), k[place])
    index = torch.tensor([3, -1, 7])
    assert torch.equal(read_values(cache, block, offset, None), v[place])
    assert torch.equal(read_values(cache, block, offset, index)[0::2], v[place[index[0::2]]])
    run, head = torch.tensor([0, 3, 2]), torch.tensor([2, 0, 1])
    row = (table[run * length // size] * kv_heads + head) * (size // length) + run * length % size // length
    for own, number, which in zip(read_runs(cache, row, length), run.tolist(), head.tolist(), strict=True):
        span = slice(number * length, (number + 1) * length)
        assert torch.equal(own, torch.cat([k[span, which], v[span, which]], -1))
    assert torch.equal(read_key_runs(cache, row, length), read_runs(cache, row, length)[..., :dim])


def test_keys_and_values_are_written_alone(scattered):
    cache, ((k, v, table),), _ = packed([64], 2, 32, 32, torch.float32, scattered)
    positions, block, offset = torch.arange(64), table.repeat_interleave(32), torch.arange(64) % 32
    block[5] = -1  # has no slot
    angles = torch.zeros(64, 32)
    angles[:, :16] = 1  # no rotation
    rotary_write(None, k + 1, None, angles, positions, block, offset, cache, None)
    rotary_write(None, None, v + 2, angles, positions, block, offset, cache, None)
    block[5] = block[4]
    there = torch.arange(64)[:, None, None] != 5
    assert torch.equal(read_keys(cache, block, offset), torch.where(there, k + 1, k))
    assert torch.equal(read_values(cache, block, offset, None), torch.where(there, v + 2, v))
