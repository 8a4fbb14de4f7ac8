"""The device half of decoding as on a GPU: nothing depends on the values of logits, and greedy rows use one kernel that
is equivalent to the CPU code."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.devices import fake_gpu, on_gpu
from tests.kernels.watched import Watched
from vllm_dlm.kernels.head_statistics import dispatch
from vllm_dlm.kernels.head_statistics import torch as plain
from vllm_dlm.methods import methods
from vllm_dlm.plugins.decoding.base import LogitRows
from vllm_dlm.plugins.decoding.entropy import Entropy
from vllm_dlm.plugins.decoding.low_confidence import LowConfidence
from vllm_dlm.step.head import numeric_fields

NAMES = sorted(methods("decoding"))
ROWS, V, MASK, EOS, EOT = 6, 300, 17, 5, 9


def rows(decoding, suppress, unlikely, sampled=False, filtered=False, eot_id=EOT):
    count = len(suppress)
    numbers = {
        name: torch.full((count,), float(value))
        for name in numeric_fields(decoding)[0]
        if (value := getattr(decoding(), name)) is not None
    }
    return LogitRows(
        temperature=torch.full((count,), 0.7 if sampled else 0.0),
        top_p=torch.full((count,), 0.8 if filtered else 1.0),
        top_k=torch.full((count,), 50 if filtered else V),
        options=numbers | {"suppress_eos": suppress, "confidence_eos_eot_inf": unlikely},
        eos_id=EOS,
        eot_id=eot_id,
        mask_id=MASK,
        sampled=sampled,
        filtered=filtered,
        exponential=lambda: torch.ones(count, V, dtype=torch.float64),
        uniform=lambda: torch.ones(count),
        memory=memory(decoding, count),
    )


def memory(decoding, count):
    """Memory of the decoding in the second step of a block"""
    remembered = decoding().memory()
    if remembered is None:
        return {}
    remembered.note(np.arange(count), np.full((remembered.noted, count), 7.0))
    columns = remembered.columns(np.arange(count), np.arange(count))
    return {name: torch.tensor(column.tolist()) for name, column in columns.items()}


def operators(decoding, sampled=False, filtered=False):
    """Names of the operators that one `propose` launches, in order"""
    marks = torch.empty(ROWS, dtype=torch.bool)
    of_rows, logits_RV = rows(decoding, marks, marks, sampled, filtered), torch.empty(ROWS, V)
    with Watched() as watched:
        proposal = decoding.propose(logits_RV, of_rows)
    assert proposal.token.shape == proposal.score.shape == proposal.prob.shape == (ROWS,)
    return watched.launched


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_shapes_do_not_depend_on_what_is_in_the_logits(name, sampled, filtered):
    with FakeTensorMode():  # on the CPU, where the code is the same and PyTorch needs no GPU driver
        assert operators(methods("decoding")[name], sampled, filtered)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_rows_take_one_kernel(name):
    decoding = methods("decoding")[name]
    with fake_gpu():
        names = operators(decoding, filtered=issubclass(decoding, LowConfidence))
    if name in ("credit", "flash_verify", "wino"):  # which note values, for which rows are looked at twice
        assert names.count("vllm_dlm::head_statistics") == 2 and len(names) <= 20
    elif name in ("entropy_schedule", "multi_block"):  # which scale logits, or note what the host has told them
        assert names.count("vllm_dlm::head_statistics") == 1 and len(names) <= 6
    else:
        assert names == ["vllm_dlm::head_statistics"] + ["aten::ones"] * (name == "random")  # which draws its order


@pytest.mark.parametrize("eot_id", [EOT, None])
@pytest.mark.parametrize("name", NAMES)
def test_one_kernel_means_the_same(name, eot_id, monkeypatch):
    """Runs the torch twin of the kernel; tests/kernels compares the two."""
    monkeypatch.setattr(dispatch, "_head_statistics", plain.head_statistics)
    g = torch.Generator().manual_seed(0)
    logits_RV = torch.randn(ROWS, V, generator=g) * 4
    for row, token in enumerate((MASK, EOS, EOT, EOS, EOT)):
        logits_RV[row, token] = 30.0
    suppress, unlikely = torch.tensor([[0, 0, 0, 1, 0, 1], [0, 0, 1, 1, 0, 1]], dtype=torch.bool)
    of_rows = rows(methods("decoding")[name], suppress, unlikely, eot_id=eot_id)
    wanted = methods("decoding")[name].propose(logits_RV.clone(), of_rows)
    got = methods("decoding")[name].propose(on_gpu(logits_RV.clone()), of_rows)
    assert torch.equal(got.token, wanted.token)
    torch.testing.assert_close(got.prob, wanted.prob, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.score, wanted.score, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.noted, wanted.noted, atol=1e-6, rtol=1e-5)


def test_a_score_of_its_own_is_not_passed_over():
    @dataclass(frozen=True)
    class Own(Entropy):
        name: ClassVar[str] = "own"

        @staticmethod
        def score(prob_RV, prob_R):
            return prob_R * 2

    assert Entropy.statistic == "entropy" and Own.statistic is None
    logits_RV, none = torch.randn(ROWS, V), torch.zeros(ROWS, dtype=torch.bool)
    proposal = Own.propose(on_gpu(logits_RV), rows(Own, none, none))
    assert torch.equal(proposal.score, proposal.prob * 2)
