"""What is compiled when an engine starts serves it from then on: neither a number of requests nor a place among what a
step uploads makes Triton compile a kernel while a client waits.

There is no GPU here: tensors of the CPU claim to lie on one, and launches are caught before they reach it.
"""

import pytest
import torch

from tests.engine.matrix import small
from tests.engine.running import runner_of
from vllm_dlm.integration.worker import warm_up
from vllm_dlm.methods import methods
from vllm_dlm.step.upload import FIRST_CAPACITY, Upload

pytest.importorskip("triton")
from tests.kernels.caught import catch_launches, compiled
from tests.kernels.interpreted import operators_take_tensors_of_the_cpu

__all__ = ["operators_take_tensors_of_the_cpu"]  # a fixture

SPARSE = sorted(name for name, selection in methods("selection").items() if selection.sparse)


@pytest.fixture
def pretending(monkeypatch):
    def start(llm):
        denoiser = runner_of(llm).denoiser
        upload = Upload(torch.device("cpu"))
        upload._host, upload._there = upload._buffers(FIRST_CAPACITY)  # as on a GPU, arrays lie one behind the other
        monkeypatch.setattr(denoiser, "upload", upload)
        monkeypatch.setattr(denoiser, "masks", True)
        # what a kernel would write is zero
        monkeypatch.setattr(torch, "empty", torch.zeros)
        monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
        monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True), raising=False)
        return catch_launches(monkeypatch, kept=compiled)

    return start


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["none", *SPARSE])
def test_nothing_is_compiled_behind_the_start(engines, pretending, monkeypatch, selection):
    chosen = {} if selection == "none" else {"additional_config": {"dlm": {"selection": small("selection", selection)}}}
    llm = engines("llada-tiny", dtype="bfloat16", **chosen)
    launches, runner = pretending(llm), runner_of(llm)
    runner.warm_up()
    started = set(launches)
    assert {name for name, *_ in started} >= {"_rotary_kernel", "_lowest_kernel"}
    launches.clear()
    monkeypatch.setattr(warm_up, "CANVASES", (3, 20))
    runner.warm_up()
    later = set(launches) - started
    print(f"{selection}: {len(started)} kernels")
    assert not later
