import pytest
import torch

from vllm_dlm.kernels.varlen_attention import varlen_attention
from vllm_dlm.kernels.varlen_attention.naive import varlen_attention as naive

LAYOUTS = [([1], [1]), ([5, 17, 1], [5, 17, 1]), ([3, 8], [64, 200]), ([40, 1, 7], [40, 33, 90])]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize(("q_lens", "kv_lens"), LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_equals_naive(heads, kv_heads, q_lens, kv_lens, dtype, tolerance):
    torch.manual_seed(0)
    q = torch.randn(sum(q_lens), heads, 32).to(dtype)
    k, v = (torch.randn(sum(kv_lens), kv_heads, 32).to(dtype) for _ in range(2))
    got = varlen_attention(q, k, v, q_lens, kv_lens, 32**-0.5)
    torch.testing.assert_close(got, naive(q, k, v, q_lens, kv_lens, 32**-0.5), atol=tolerance, rtol=tolerance)


def test_sequences_do_not_see_each_other():
    torch.manual_seed(0)
    q, k, v = torch.randn(30, 4, 32), torch.randn(30, 2, 32), torch.randn(30, 2, 32)
    whole = varlen_attention(q, k, v, [10, 20], [10, 20], 1.0)
    k[10:] = torch.nan
    poisoned = varlen_attention(q, k, v, [10, 20], [10, 20], 1.0)
    assert torch.equal(whole[:10], poisoned[:10]) and poisoned[10:].isnan().all()
