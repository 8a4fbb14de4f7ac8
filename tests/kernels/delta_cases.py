"""DyLLM's changes of contexts against the definition, on the CPU and with Triton's interpreter; run by
test_triton_interpreter.py."""

import pytest
import torch

from tests.kernels.devices import on_gpu
from tests.kernels.interpreted import *  # noqa: F403
from tests.kernels.step_inputs import heads
from vllm_dlm.kernels.delta_attention import delta_over_pages, naive

pytestmark = pytest.mark.parametrize("on", [pytest.param(lambda x: x, id="cpu"), pytest.param(on_gpu, id="gpu")])


def inputs(q_lens, kv_lens, q_heads, kv_heads, dim, dtype, block_size, every=5, names=torch.int32):
    """Blocks in shuffled order with NaN at their ends. No value has changed in the first tile of each canvas."""
    g = torch.Generator().manual_seed(dim)
    needed = [-(-length // block_size) for length in kv_lens]
    order = torch.randperm(sum(needed) + 2, generator=g)
    cache = torch.full((len(order), kv_heads, block_size, 2 * dim), torch.nan, dtype=dtype)
    tables = torch.full((len(kv_lens), max(needed)), -1)
    for c, (count, blocks) in enumerate(zip(needed, order[: sum(needed)].split(needed), strict=True)):
        tables[c, :count] = blocks
        keys = torch.randn(count * block_size, kv_heads, 2 * dim, generator=g).to(dtype)
        keys[kv_lens[c] :] = torch.nan
        cache[blocks] = keys.view(count, block_size, kv_heads, -1).transpose(1, 2)
    place = torch.full((len(kv_lens), max(kv_lens) + 3), -1)
    slots = 0
    for c, length in enumerate(kv_lens):
        changed = torch.arange(min(64, length), length, every)
        place[c, changed] = slots + torch.randperm(len(changed), generator=g)
        slots += len(changed)
    moved = heads(max(slots, 1), kv_heads, dim, dtype=dtype, seed=3)
    q = heads(sum(q_lens), q_heads + 1, dim, dtype=dtype)[:, :q_heads]  # not contiguous
    starts = torch.tensor([0, *q_lens]).cumsum(0)
    tensors = starts.to(names), cache, tables.to(names), torch.tensor(kv_lens).to(names), place.to(names), moved
    return q, *tensors, dim**-0.5


def compare(on, arguments, tolerance, q_lens, kv_lens):
    q, *rest = arguments
    got = delta_over_pages(on(q), *rest, max(q_lens) + 1, max(kv_lens))
    wanted = naive.delta_over_pages(q, *rest)
    assert got.shape == q.shape and got.is_contiguous()
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)
    return got


@pytest.mark.parametrize(
    "q_lens, kv_lens, q_heads, kv_heads, dim, dtype, tolerance, block_size, names",
    [
        ((9,), (150,), 2, 2, 64, torch.float32, 1e-5, 16, torch.int32),
        ((5, 0, 12), (100, 33, 260), 6, 2, 80, torch.bfloat16, 1e-2, 64, torch.int64),
        ((70, 3), (90, 200), 2, 1, 128, torch.float16, 2e-3, 128, torch.int32),  # several tiles of rows
        ((4,), (40,), 2, 2, 64, torch.float32, 1e-5, 16, torch.int32),  # nothing has changed
    ],
)
def test_delta(on, q_lens, kv_lens, q_heads, kv_heads, dim, dtype, tolerance, block_size, names):
    arguments = inputs(q_lens, kv_lens, q_heads, kv_heads, dim, dtype, block_size, names=names)
    got = compare(on, arguments, tolerance, q_lens, kv_lens)
    assert bool(got.any()) == (max(kv_lens) > 64)


def test_every_value_has_moved(on):
    arguments = inputs((3, 6), (200, 70), 4, 2, 64, torch.float32, 32, every=1)
    arguments[5][:, :70] = torch.arange(70, dtype=torch.int32)
    compare(on, arguments, 1e-5, (3, 6), (200, 70))


def test_queries_behind_the_last_canvas_are_left_alone(on):
    q, starts, *rest = inputs((5, 4), (100, 80), 2, 2, 64, torch.float32, 16)
    starts[-1] = 7
    got = delta_over_pages(on(q), starts, *rest, 5, 100)
    torch.testing.assert_close(got[:7], naive.delta_over_pages(q, starts, *rest)[:7], atol=1e-5, rtol=1e-5)
