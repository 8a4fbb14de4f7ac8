"""The baseline computes what LLaDA's published code computed, and what this engine computes."""

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from benchmarks import reference_loop
from tests.conftest import GOLDEN, golden_tensors

MASK = 392


@pytest.fixture(scope="module")
def loop():
    return reference_loop.load(GOLDEN / "checkpoints/llada-tiny", torch.float32)


@pytest.mark.parametrize("run", ["llada.g32_b32_s32_t0", "llada.g32_b8_s16_t0"])
def test_loop_equals_the_recorded_reference(loop, golden_runs, run):
    tensors, params = golden_tensors(run), golden_runs[run]["params"]
    prompt, final = tensors["prompt"][0].tolist(), tensors["final"][0].tolist()
    response = reference_loop.generate(
        loop, prompt, params["gen_length"], params["block_length"], params["steps"], MASK
    )
    assert prompt + response == final


@pytest.mark.parametrize(("length", "new", "block", "steps"), [(5, 32, 8, 32), (40, 64, 32, 64), (17, 48, 16, 12)])
def test_loop_equals_the_engine(loop, engines, length, new, block, steps):
    prompt = np.random.default_rng(length).integers(0, 380, length).tolist()
    expected = reference_loop.generate(loop, prompt, new, block, steps, MASK)
    params = SamplingParams(
        temperature=0,
        max_tokens=new,
        ignore_eos=True,
        detokenize=False,
        extra_args={"dlm_steps": steps, "dlm_block_length": block},
    )
    output = engines("llada-tiny").generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0]
    assert list(output.outputs[0].token_ids) == expected
    assert MASK not in expected


def test_quotas():
    assert reference_loop.quotas(32, 32) == [1] * 32
    assert reference_loop.quotas(10, 4) == [3, 3, 2, 2]
    assert reference_loop.quotas(3, 5) == [1, 1, 1, 0, 0]
