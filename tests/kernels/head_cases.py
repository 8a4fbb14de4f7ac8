"""Statistics of the head's logits against the definition, on the CPU and with Triton's interpreter; run by
test_triton_interpreter.py."""

import pytest
import torch

from tests.kernels.devices import on_gpu
from tests.kernels.interpreted import *  # noqa: F403
from vllm_dlm.kernels.head_statistics import head_statistics, naive
from vllm_dlm.kernels.head_statistics import triton as triton_head

MASK, EOS, EOT = 7, 3, 650
pytestmark = pytest.mark.parametrize("on", [pytest.param(lambda x: x, id="cpu"), pytest.param(on_gpu, id="gpu")])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(triton_head, "TILE", 128)


def compare(on, logits, tolerance=1e-6, **options):
    got = head_statistics(on(logits), MASK, EOS, EOT, entropy=True, **options)
    suppress, unlikely = options.get("suppress_eos"), options.get("unlikely_ends")
    token, *numbers = naive.head_statistics(logits, MASK, EOS, EOT, suppress, unlikely, True)
    assert torch.equal(got.token, token)
    for name, x, y in zip(got._fields[1:], got[1:], numbers, strict=True):
        torch.testing.assert_close(x.double(), y, atol=tolerance, rtol=2e-6, equal_nan=True, msg=name)


def logits_of(rows, width, dtype=torch.float32, spread=4.0):
    g = torch.Generator().manual_seed(rows)
    logits = (torch.randn(rows, 2, width, generator=g) * spread).to(dtype)[:, 1]  # not contiguous
    for r, token in enumerate((MASK, EOS, EOT)):  # each of them is the best token of some row
        logits[r % rows, token] = 30.0
    return logits


@pytest.mark.parametrize(
    "dtype, marked, processors",  # one share of a row, or several
    [(torch.float32, False, 1000), (torch.float32, True, 1), (torch.bfloat16, True, 1000)],
)
def test_statistics(on, dtype, marked, processors, monkeypatch):
    monkeypatch.setattr(triton_head, "processors", lambda device: processors)
    logits = logits_of(6, 700, dtype)
    suppress, unlikely = torch.tensor([[0, 1, 0, 1, 0, 0], [1, 0, 1, 1, 0, 0]], dtype=torch.bool)
    compare(on, logits, **({"suppress_eos": suppress, "unlikely_ends": unlikely} if marked else {}))


def test_ties_go_to_the_lowest_token(on):
    logits = logits_of(4, 700).round()
    logits[0] = 1.0
    logits[1, [600, 300, 40, MASK]] = 40.0
    logits[2, [100, 90]] = 50.0
    compare(on, logits)


def test_sure_and_even_rows(on):
    logits = logits_of(3, 700, spread=30.0)
    logits[0, 100] = 200.0
    logits[1] = 0.0
    logits[2, 5:] = -torch.inf
    compare(on, logits)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_rows_without_probabilities(on, broken):
    logits = logits_of(3, 700)
    logits[0, 400], logits[1] = broken, -torch.inf
    got = head_statistics(on(logits), MASK)
    assert got.prob.isfinite().tolist() == [False, False, True]
    assert ((got.token >= 0) & (got.token < 700)).all()
    assert got.entropy.shape == (0,)


def test_no_rows(on):
    assert head_statistics(on(torch.zeros(0, 700)), MASK).token.shape == (0,)
