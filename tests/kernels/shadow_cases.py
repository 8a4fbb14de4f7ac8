"""Shadow attention, which hides one key per row, against its definition, on the CPU and with Triton's interpreter; run
by test_triton_interpreter.py."""

import pytest
import torch

from tests.kernels.devices import on_gpu
from tests.kernels.interpreted import *  # noqa: F403
from tests.kernels.step_inputs import heads
from vllm_dlm.kernels.shadow_attention import naive, shadow_attention

pytestmark = pytest.mark.parametrize("on", [pytest.param(lambda x: x, id="cpu"), pytest.param(on_gpu, id="gpu")])


def inputs(q_lens, shadow_lens, kv_lens, q_heads, kv_heads, dim, dtype, block_size):
    """Blocks in shuffled order with NaN at their ends."""
    g = torch.Generator().manual_seed(dim)
    needed = [-(-length // block_size) for length in kv_lens]
    order = torch.randperm(sum(needed) + 2, generator=g)
    cache = torch.full((len(order), kv_heads, block_size, 2 * dim), torch.nan, dtype=dtype)
    tables = torch.zeros(len(kv_lens), max(needed), dtype=torch.int32)
    for c, (count, blocks) in enumerate(zip(needed, order[: sum(needed)].split(needed), strict=True)):
        tables[c, :count] = blocks
        own = torch.randn(count * block_size, kv_heads, 2 * dim, generator=g).to(dtype)
        own[kv_lens[c] :] = torch.nan
        cache[blocks] = own.view(count, block_size, kv_heads, -1).transpose(1, 2)
    hidden = [torch.randint(0, length, (rows,), generator=g) for rows, length in zip(q_lens, kv_lens, strict=True)]
    q = heads(sum(q_lens), q_heads + 1, dim, dtype=dtype)[:, :q_heads]  # not contiguous
    k, v = (heads(sum(shadow_lens), kv_heads + 2, dim, dtype=dtype, seed=seed)[:, :kv_heads] for seed in (3, 4))
    q_starts, k_starts = (torch.tensor([0, *lens]).cumsum(0, dtype=torch.int32) for lens in (q_lens, shadow_lens))
    lens = torch.tensor(kv_lens, dtype=torch.int32)
    return q, q_starts, torch.cat(hidden), k, v, k_starts, cache, tables, lens, dim**-0.5


@pytest.mark.parametrize(
    "q_lens, shadow_lens, kv_lens, q_heads, kv_heads, dim, dtype, tolerance, block_size",
    [
        ((9,), (9,), (150,), 2, 2, 64, torch.float32, 1e-5, 16),
        ((5, 0, 12), (8, 16, 12), (100, 33, 260), 6, 2, 80, torch.bfloat16, 1e-2, 64),
        ((70, 3), (96, 32), (90, 200), 2, 1, 128, torch.float16, 2e-3, 128),  # several tiles of rows and of shadow keys
        ((1, 2), (1, 2), (1, 17), 2, 2, 64, torch.float32, 1e-5, 16),  # the only key of the canvas is hidden
    ],
)
def test_equals_its_definition(on, q_lens, shadow_lens, kv_lens, q_heads, kv_heads, dim, dtype, tolerance, block_size):
    q, *rest = inputs(q_lens, shadow_lens, kv_lens, q_heads, kv_heads, dim, dtype, block_size)
    got = shadow_attention(on(q), *rest, max(q_lens))
    wanted = naive.shadow_attention(q, *rest)
    assert got.shape == q.shape and got.is_contiguous() and wanted.isfinite().all()
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


def test_the_hidden_position_is_without_effect_and_others_are_not(on):
    q, *rest = inputs((1,), (4,), (20,), 2, 2, 64, torch.float32, 16)
    before = shadow_attention(on(q), *rest, 1)
    hidden, cache, table = int(rest[1][0]), rest[5], rest[6][0].long()
    for position, same in ((hidden, True), ((hidden + 1) % 20, False)):
        rest[5] = cache.clone()
        rest[5][table[position // 16], :, position % 16] += 5
        assert torch.equal(before, shadow_attention(on(q), *rest, 1)) == same
