"""Residual sums and their norms on a CPU against the definition."""

import pytest
import torch
from vllm import _custom_ops  # noqa: F401  with vLLM's kernels

from vllm_dlm.kernels.add_norm import add_norm, naive
from vllm_dlm.kernels.add_norm import torch as plain
from vllm_dlm.kernels.add_norm import vllm as by_vllm


@pytest.mark.parametrize("implementation", [plain, by_vllm], ids=["torch", "vllm"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("width", [64, 128, 768])
def test_equals_its_definition(implementation, dtype, tolerance, width):
    torch.manual_seed(0)
    x, added = torch.randn(2, 9, width).to(dtype)
    weight = torch.rand(width).to(dtype)
    got = implementation.add_norm(x, added, weight, 1e-5)
    torch.testing.assert_close(got, naive.add_norm(x, added, weight, 1e-5), atol=tolerance, rtol=tolerance)
    assert torch.equal(got[1], x + added)
    assert by_vllm.runs(x, weight) and torch.equal(
        by_vllm.add_norm(x, added, weight, 1e-5), add_norm(x, added, weight, 1e-5)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_others(dtype):
    torch.manual_seed(0)
    x, added = torch.randn(2, 70, 128).to(dtype)
    weight = torch.rand(128).to(dtype)
    together = add_norm(x, added, weight, 1e-5)
    x[3], added[5] = torch.nan, torch.inf
    for rows in (slice(0, 1), slice(6, 9), slice(10, 70)):
        assert torch.equal(add_norm(x[rows], added[rows], weight, 1e-5), together[:, rows])
    assert add_norm(x[:0], added[:0], weight, 1e-5).shape == (2, 0, 128)
