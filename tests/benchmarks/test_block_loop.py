"""The baselines compute what the published code computed."""

import json

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import block_loop
from tests.conftest import GOLDEN

RUNS = json.loads((GOLDEN / "block/runs.json").read_text())
#: filled by quotas alone, as the benchmark does; and no longer than the canvas that was recorded
STATIC = [name for name, run in RUNS.items() if name.startswith(("sdar", "llada20")) and run["threshold"] >= 1]


@pytest.mark.parametrize("name", STATIC)
def test_recorded_answer(name):
    run = RUNS[name]
    arrays = load_file(GOLDEN / "block/runs" / f"{name}.safetensors")
    model = block_loop.load(GOLDEN / "checkpoints" / run["ckpt"], torch.float32)
    got = model.generate(arrays["prompt"].tolist(), run["G"], run["B"], run["steps"])
    wanted = arrays["answer"].tolist()
    assert got[: len(wanted)] == wanted


def test_there_are_runs_of_both():
    assert {RUNS[name]["ckpt"] for name in STATIC} == {"sdar-tiny", "llada2-tiny"}
