"""The baselines compute what the published code computed, and what this engine computes."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from vllm import SamplingParams

from benchmarks.lib import loops
from benchmarks.lib.models import SHAPES
from tests.conftest import GOLDEN, golden_tensors

RUNS = json.loads((GOLDEN / "block/runs.json").read_text())
#: filled by quotas alone, as the benchmark does; and no longer than the canvas that was recorded
STATIC = [name for name, run in RUNS.items() if name.startswith(("sdar", "llada20")) and run["threshold"] >= 1]
MASK = 392


@pytest.fixture(scope="module")
def loop():
    return loops.load(GOLDEN / "checkpoints/llada-tiny", torch.float32)


@pytest.mark.parametrize("run", ["llada.g32_b32_s32_t0", "llada.g32_b8_s16_t0"])
def test_loop_equals_the_recorded_reference(loop, golden_runs, run):
    tensors, params = golden_tensors(run), golden_runs[run]["params"]
    prompt, final = tensors["prompt"][0].tolist(), tensors["final"][0].tolist()
    new, block = params["gen_length"], params["block_length"]
    response = loop.generate(prompt, new, block, params["steps"] * block // new)
    assert prompt + response == final


@pytest.mark.parametrize(("length", "new", "block", "steps"), [(5, 32, 8, 32), (40, 64, 32, 64), (17, 48, 16, 12)])
def test_loop_equals_the_engine(loop, engines, length, new, block, steps):
    prompt = np.random.default_rng(length).integers(0, 380, length).tolist()
    expected = loop.generate(prompt, new, block, steps * block // new)
    options = {"dlm_steps": steps, "dlm_block_length": block}
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, extra_args=options)
    output = engines("llada-tiny").generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0]
    assert list(output.outputs[0].token_ids) == expected
    assert MASK not in expected


@pytest.mark.parametrize("name", STATIC)
def test_recorded_answer_of_a_block_causal_model(name):
    run = RUNS[name]
    arrays = load_file(GOLDEN / "block/runs" / f"{name}.safetensors")
    model = loops.load(GOLDEN / "checkpoints" / run["ckpt"], torch.float32)
    got = model.generate(arrays["prompt"].tolist(), run["G"], run["B"], run["steps"])
    wanted = arrays["answer"].tolist()
    assert got[: len(wanted)] == wanted


def test_there_are_runs_of_both():
    assert {RUNS[name]["ckpt"] for name in STATIC} == {"sdar-tiny", "llada2-tiny"}


def test_quotas():
    assert loops.quotas(32, 32) == [1] * 32
    assert loops.quotas(10, 4) == [3, 3, 2, 2]
    assert loops.quotas(3, 5) == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("name", ["toy-llada", "toy-sdar", "toy-llada2"])
def test_a_random_checkpoint_is_one_that_the_loop_reads(name, tmp_path):
    """Deterministic, kept, and of the stated size."""
    shape = SHAPES[name]
    first, second = (shape.checkpoint("float32", tmp_path / place) for place in "ab")
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    if shape.family == "llada":
        assert sum(tensor.numel() for tensor in one.values()) == shape.parameters
    written = (second / "model.safetensors").stat().st_mtime_ns
    assert shape.checkpoint("float32", tmp_path / "b") == second
    assert (second / "model.safetensors").stat().st_mtime_ns == written
    block = shape.block if shape.family != "llada" else 8
    answer = loops.load(first, torch.float32).generate([*range(1, 10)], 8, block, block)
    assert len(answer) == 8 and shape.mask_id not in answer
