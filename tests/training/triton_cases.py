"""The Triton path with the interpreter against the definition, including gradients; run by test_triton.py in a process
that enables the interpreter before importing Triton. Memory that a launcher allocates holds garbage."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.triton_cases import garbage  # noqa: F401
from tests.tiers import in_turn, slow
from vllm_dlm.kernels.soft_page_attention import Gate, naive, triton
from vllm_dlm.kernels.triton_utils import UPCAST

SCALE = 0.2
CAUSAL = Gate(page_size=16, budget_pages=3, recent_pages=1, temperature=0.7)
BIDIRECTIONAL = replace(CAUSAL, causal=False)
#: gate, query heads, key heads, queries, keys, prompt, channels
CASES = {
    "causal": (CAUSAL, 4, 2, 70, 70, 0, 16),
    "causal, cached": (replace(CAUSAL, page_size=32, budget_pages=2, sink_pages=0), 3, 1, 7, 120, 0, 24),
    "causal, large pages": (replace(CAUSAL, page_size=64, budget_pages=1, sink_pages=0), 2, 2, 3, 200, 0, 16),
    "response": (BIDIRECTIONAL, 4, 2, 80, 80, 70, 16),
    "response in blocks": (replace(BIDIRECTIONAL, query_block=8), 2, 1, 20, 110, 90, 40),
    "bidirectional": (replace(BIDIRECTIONAL, budget_pages=3, sink_pages=0), 2, 1, 70, 70, 0, 16),
}


def test_the_interpreter_runs():
    assert UPCAST.value


def tensors(case, dtype=torch.float32, batch=1):
    gate, heads, kv_heads, count, keys, prompt_len, dim = CASES[case]
    g = torch.Generator().manual_seed(0)
    made = (
        torch.randn(batch, n, h, dim, generator=g)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()  # strides as after the projections
        for h, n in ((heads, count), (kv_heads, keys), (kv_heads, keys))
    )
    return gate, *made, prompt_len


@pytest.mark.parametrize("temperature, case", in_turn([0.7, 0.0], list(CASES)))
def test_it_is_the_definition(case, temperature):
    gate, q, k, v, prompt_len = tensors(case, batch=2 if case == "causal" else 1)
    gate = replace(gate, temperature=temperature)
    got = triton.soft_page_attention(q, k, v, gate, SCALE, prompt_len)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = naive.soft_page_attention(*exact, gate, SCALE, prompt_len)
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-5)
    direction = torch.randn_like(got)
    wanted = torch.autograd.grad(want, exact, direction.double())
    for mine, theirs in zip(torch.autograd.grad(got, (q, k, v), direction), wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 4e-2), *slow((torch.float16, 5e-3))])
def test_half_precision(dtype, tolerance):
    gate, q, k, v, prompt_len = tensors("causal", dtype)
    got = triton.soft_page_attention(q, k, v, gate, SCALE, prompt_len)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = naive.soft_page_attention(*exact, gate, SCALE, prompt_len)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)
    direction = torch.randn_like(got)
    wanted = torch.autograd.grad(want, exact, direction.double())
    for mine, theirs in zip(torch.autograd.grad(got, (q, k, v), direction), wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=3 * tolerance, rtol=3 * tolerance)


@pytest.mark.slow
def test_the_size_of_the_pieces_does_not_matter(monkeypatch):
    for case in ("causal", "response"):
        gate, q, k, v, prompt_len = tensors(case)
        whole = triton.soft_page_attention(q, k, v, gate, SCALE, prompt_len)
        grads = torch.autograd.grad(whole.square().sum(), (q, k, v))
        with monkeypatch.context() as patch:
            patch.setattr(triton.plain, "in_pieces", in_small_pieces(triton.plain.in_pieces))
            cut = triton.soft_page_attention(q, k, v, gate, SCALE, prompt_len)
            torch.testing.assert_close(cut, whole, atol=1e-6, rtol=1e-5)
            for mine, theirs in zip(torch.autograd.grad(cut.square().sum(), (q, k, v)), grads, strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def in_small_pieces(in_pieces):
    return lambda piece, limit, *rest: in_pieces(piece, 9, *rest)
