"""A chunk's attention over its past and itself against the masked definition in float64."""

import pytest
import torch

from vllm_dlm.kernels.causal_attention import causal_attention, cpu, naive

SEQUENCES = [((40,), (40,)), ((200,), (1,)), ((130, 64, 33), (30, 64, 1)), ((96, 17), (16, 17))]


def paged(kv_lens, q_lens, heads, kv_heads, dim, block=32, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    needed = [-(-n // block) for n in kv_lens]
    order = torch.randperm(sum(needed) + 2, generator=g).to(torch.int32)
    pages = torch.full((len(order), kv_heads, block, 2 * dim), torch.nan, dtype=dtype)
    tables = list(order[: sum(needed)].split(needed))
    for table, length in zip(tables, kv_lens, strict=True):
        for i, page in enumerate(table.tolist()):
            filled = min(block, length - i * block)
            pages[page, :, :filled] = torch.randn(kv_heads, filled, 2 * dim, generator=g).to(dtype)
    q = torch.randn(sum(q_lens), heads, dim, generator=g).to(dtype)
    return q, pages, tables, q_lens, kv_lens, dim**-0.5


@pytest.mark.parametrize("gathered", [cpu.GATHERED, 1])
@pytest.mark.parametrize("kv_lens, q_lens", SEQUENCES)
@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 4, 32), (14, 2, 64), (4, 1, 80)])
def test_fast_path_is_naive(monkeypatch, kv_lens, q_lens, heads, kv_heads, dim, gathered):
    monkeypatch.setattr(cpu, "GATHERED", gathered)  # 1: a head at a time
    batch = paged(kv_lens, q_lens, heads, kv_heads, dim)
    torch.testing.assert_close(causal_attention(*batch), naive.causal_attention(*batch), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision(dtype, tolerance):
    batch = paged((300, 64), (40, 64), 8, 2, 64, dtype=dtype)
    torch.testing.assert_close(
        causal_attention(*batch), naive.causal_attention(*batch), atol=tolerance, rtol=tolerance
    )
