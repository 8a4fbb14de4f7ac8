"""The torch path, computed in pieces, against the definition; its gradients; and both limits of the mask."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiers import in_turn, pairwise, slow
from vllm_dlm.kernels.haar_pyramid import STD_KINDS
from vllm_dlm.kernels.page_scores import REDUCTIONS
from vllm_dlm.kernels.soft_page_attention import Gate, measure, naive, soft_page_attention
from vllm_dlm.kernels.soft_page_attention import gate as gates
from vllm_dlm.kernels.soft_page_attention import torch as plain

SCALE = 0.35
CAUSAL = Gate(page_size=4, budget_pages=4, recent_pages=1, temperature=0.7)
BIDIRECTIONAL = replace(CAUSAL, causal=False)
#: gate, query heads, key heads, queries, keys, prompt
CASES = {
    "causal": (CAUSAL, 4, 2, 43, 43, 0),
    "causal, prompt": (CAUSAL, 2, 2, 43, 43, 21),
    "causal, cached": (CAUSAL, 2, 1, 7, 40, 0),
    "causal, context": (replace(CAUSAL, min_context=30, recent_pages=2), 2, 2, 42, 42, 0),
    "response": (BIDIRECTIONAL, 4, 2, 43, 43, 33),
    "response in blocks": (replace(BIDIRECTIONAL, query_block=4), 2, 1, 43, 43, 32),
    "response, cached": (replace(BIDIRECTIONAL, query_block=4, sink_pages=0), 2, 1, 6, 43, 32),
    "bidirectional": (replace(BIDIRECTIONAL, budget_pages=5), 2, 2, 43, 43, 0),
}


MOVING = ["causal", "causal, prompt", "response", "bidirectional"]


def tensors(case, batch=2, dim=8, dtype=torch.float64):
    gate, heads, kv_heads, count, keys, prompt_len = CASES[case]
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, h, n, dim, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        for h, n in ((heads, count), (kv_heads, keys), (kv_heads, keys))
    )
    return gate, q, k, v, prompt_len


def both(gate, q, k, v, prompt_len):
    return [f(q, k, v, gate, SCALE, prompt_len) for f in (soft_page_attention, naive.soft_page_attention)]


def compare_with_gradients(gate, q, k, v, prompt_len):
    got, want = both(gate, q, k, v, prompt_len)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)
    direction = torch.randn_like(want)
    for mine, theirs in zip(
        torch.autograd.grad(got, (q, k, v), direction), torch.autograd.grad(want, (q, k, v), direction), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("temperature", [0.7, 0.0])
@pytest.mark.parametrize("case", CASES)
def test_pieces_are_naive(case, temperature):
    gate, *rest = tensors(case)
    compare_with_gradients(replace(gate, temperature=temperature), *rest)


@pytest.mark.parametrize("case, std_kind, reduce", pairwise(["causal", "response"], STD_KINDS, REDUCTIONS))
def test_every_score(case, std_kind, reduce):
    gate, *rest = tensors(case)
    # softmax_sum scores are between 0 and the number of rows
    compare_with_gradients(replace(gate, std_kind=std_kind, reduce=reduce, lam=0.3), *rest)


@pytest.mark.parametrize("reduce, case", in_turn(list(REDUCTIONS), MOVING))
def test_the_size_of_the_pieces_does_not_matter(case, reduce, monkeypatch):
    monkeypatch.setattr(gates, "ROWS", 3)
    monkeypatch.setattr(plain, "ROWS", 3)
    gate, *rest = tensors(case)
    compare_with_gradients(replace(gate, reduce=reduce), *rest)


@pytest.mark.parametrize("case", ["causal", *slow("response")])
def test_gradcheck(case, monkeypatch):
    """Against finite differences with fixed thresholds, as autograd treats them."""
    gate, q, k, v, prompt_len = tensors(case, batch=1, dim=2)
    threshold, still = plain.threshold, []
    monkeypatch.setattr(plain, "threshold", lambda *args: still.append(threshold(*args)) or still[-1])
    soft_page_attention(q, k, v, gate, SCALE, prompt_len)

    def nearest(*args):
        moved = threshold(*args)
        return min(
            (tau for tau in still if tau.shape == moved.shape),
            key=lambda tau: (tau.nan_to_num() - moved.nan_to_num()).abs().max(),
        )

    monkeypatch.setattr(plain, "threshold", nearest)
    assert torch.autograd.gradcheck(lambda *x: soft_page_attention(*x, gate, SCALE, prompt_len), (q, k, v), atol=1e-6)


@pytest.mark.parametrize("reduce, case", in_turn(list(REDUCTIONS), MOVING))
def test_a_threshold_that_moves(case, reduce):
    gate, *rest = tensors(case)
    compare_with_gradients(replace(gate, reduce=reduce, stop_threshold=False), *rest)


#: the kind that takes least time; the gradients of all of them are compared with those of the definition above
CHECKED = list(zip(MOVING, (*REDUCTIONS, REDUCTIONS[0]), strict=True))


@pytest.mark.parametrize(("case", "reduce"), [CHECKED[0], *slow(*CHECKED[1:])])
def test_gradcheck_of_a_threshold_that_moves(case, reduce):
    """Against finite differences without fixed thresholds."""
    gate, q, k, v, prompt_len = tensors(case, batch=1, dim=2)
    gate = replace(gate, reduce=reduce, stop_threshold=False)
    assert torch.autograd.gradcheck(lambda *x: soft_page_attention(*x, gate, SCALE, prompt_len), (q, k, v), atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_budget_of_all_pages_is_dense_attention(case):
    gate, q, k, v, prompt_len = tensors(case)
    gate = replace(gate, budget_pages=11)
    mask = None
    if gate.causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    want = scaled_dot_product_attention(q, k, v, mask, scale=SCALE, enable_gqa=True)
    for got in both(gate, q, k, v, prompt_len):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_a_vanishing_temperature_is_the_hard_mask(case):
    gate, *rest = tensors(case)
    cold, hard = (soft_page_attention(*rest[:3], replace(gate, temperature=t), SCALE, rest[3]) for t in (1e-9, 0.0))
    torch.testing.assert_close(cold, hard, atol=1e-9, rtol=1e-7)
    warm = soft_page_attention(*rest[:3], gate, SCALE, rest[3])
    assert not torch.allclose(warm, hard, atol=1e-3)


def test_no_gradient_through_the_threshold_but_through_the_statistics():
    gate, q, k, v, prompt_len = tensors("causal")
    v = torch.ones_like(v)  # with equal values, the output does not depend on the weights
    (grad,) = torch.autograd.grad(soft_page_attention(q, k, v, gate, SCALE, prompt_len).sum(), k)
    torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-12, rtol=0)
    # the gradient through the spread changes the keys' gradients
    q, k, v = (x.detach().clone() for x in tensors("causal")[1:4])
    k.requires_grad_()
    grads = [
        torch.autograd.grad(soft_page_attention(q, k, v, replace(gate, lam=lam), SCALE).square().sum(), k)[0]
        for lam in (0.0, 0.5)
    ]
    assert not torch.allclose(*grads)


def test_equal_keys_have_finite_gradients():
    gate, q, k, v, prompt_len = tensors("causal")
    k = torch.ones_like(k, requires_grad=True)
    for kind in STD_KINDS:
        out = soft_page_attention(q, k, v, replace(gate, std_kind=kind), SCALE, prompt_len)
        assert torch.autograd.grad(out.square().sum(), k)[0].isfinite().all()


def test_half_precision_is_computed_in_float32():
    gate, q, k, v, prompt_len = tensors("causal", dtype=torch.bfloat16)
    got = soft_page_attention(q, k, v, gate, SCALE, prompt_len)
    want = naive.soft_page_attention(q.double(), k.double(), v.double(), gate, SCALE, prompt_len)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, atol=2e-2, rtol=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = soft_page_attention(q.float(), k.float(), v, gate, SCALE, prompt_len)
    assert torch.equal(mixed, got)


@pytest.mark.parametrize("case", ["causal", "response"])
def test_the_measure_counts_what_is_closed(case):
    gate, q, k, _, prompt_len = tensors(case)
    soft, hard = (measure(q, k, replace(gate, temperature=t), SCALE, prompt_len) for t in (0.7, 0.0))
    assert 0 < hard.shares["pages_under_threshold"] < 1
    assert hard.under == soft.under and hard.weight == soft.weight > 0
    assert hard.leaked == hard.gates == 0
    assert 0 < soft.leaked < soft.weight and 0 < soft.gates / soft.under < 0.5
    assert measure(q, k, replace(gate, budget_pages=11), SCALE, prompt_len).rows == 0


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and 0 not in tensor.stride():
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("prompt_len", [0, 100])
@pytest.mark.parametrize("causal", [True, False])
def test_memory_is_linear_in_length(causal, prompt_len):
    """With twice the length, neither a tensor of either pass nor the saved memory grows much more than twofold."""
    gate = Gate(page_size=16, budget_pages=4, causal=causal)
    largest, kept = [], []
    for length in (1024, 2048):
        q, k, v = (torch.randn(1, 2, length, 8, requires_grad=True) for _ in range(3))
        saved = {}

        def keep(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with LargestTensor() as seen:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                out = soft_page_attention(q, k, v, gate, SCALE, prompt_len)
            out.sum().backward()
        largest.append(seen.elements)
        kept.append(sum(saved.values()))
    assert largest[1] <= 2.1 * largest[0] <= 2.1 * 1024 * 2 * 128
    assert kept[1] <= 2.1 * kept[0]
