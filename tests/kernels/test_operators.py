"""Each launch is one PyTorch operator, whatever device its tensors claim to be on."""

import importlib
import pkgutil
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.kernels.devices import fake_gpu
from tests.kernels.launches import CASES, RARER, Launching
from tests.kernels.watched import Watched
from vllm_dlm import kernels
from vllm_dlm.kernels.operators import LAUNCHERS, NAMESPACE

CALLS = CASES | RARER
for folder in pkgutil.iter_modules(kernels.__path__):
    if folder.ispkg:
        importlib.import_module(f"{kernels.__name__}.{folder.name}")


def watched(case):
    with fake_gpu():
        call = CALLS[case]()
        with Watched() as watch:
            call()
    return watch.launched


@pytest.mark.parametrize("case", CALLS)
def test_a_call_is_one_operator(case):
    (operator,) = watched(case)
    assert operator.startswith(f"{NAMESPACE}::")


def test_every_operator_has_a_case():
    assert {operator.partition("::")[2] for case in CALLS for operator in watched(case)} == set(LAUNCHERS)


@pytest.mark.parametrize("case", CALLS)
def test_fakes_are_like_what_launches_make(case, monkeypatch):
    """Kernels may be no-ops here, because launchers allocate the outputs."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    with fake_gpu():
        call = CALLS[case]()
        fakes = call()
        with Launching():
            made = call()
    assert likeness(fakes) == likeness(made)


def likeness(outputs):
    return [(x.shape, x.dtype, x.stride(), x.device) for x in tree_leaves(outputs) if x is not None]
