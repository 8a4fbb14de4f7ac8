"""LLaDA with experts: recorded runs of the official code."""

import json
import random
from itertools import islice

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from vllm import SamplingParams

from tests.conftest import GOLDEN
from tests.engine.running import Recorder, tokens
from tests.engine.test_rules_golden import Canvases
from tests.engine.worker_calls import logits_of

CHECKPOINT = "lladamoe-tiny"
RUNS = json.loads((GOLDEN / "block/runs.json").read_text())


def recorded(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "block/runs" / f"{name}.safetensors")


@pytest.fixture
def llm(engines):
    return engines(CHECKPOINT)


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("lladamoe")])
def test_recorded_run(llm, name):
    run, arrays = RUNS[name], recorded(name)
    extra = {"dlm_block_length": run["B"], "dlm_steps": run["steps"]}
    params = SamplingParams(temperature=0, max_tokens=run["G"], ignore_eos=True, detokenize=False, extra_args=extra)
    with Canvases(llm) as canvases:
        (got,) = tokens(llm, [({"prompt_token_ids": arrays["prompt"].tolist()}, params)])
    assert list(got) == arrays["answer"].tolist()
    assert canvases.steps == arrays["canvas"].tolist()


@pytest.mark.parametrize("length", [1, 17, 64])
def test_logits(llm, length):
    arrays = recorded(f"lladamoe.logits{length}")
    ((got,),) = llm.collective_rpc(logits_of, args=([arrays["ids"].tolist()],))
    torch.testing.assert_close(got, arrays["logits"], atol=1e-4, rtol=1e-5)


def test_holes_of_a_prompt_are_filled(llm):
    rng = random.Random(2)
    prompt = [rng.randrange(390) for _ in range(30)]
    prompt[5] = prompt[17] = 511
    with Recorder(llm) as seen:
        tokens(llm, [({"prompt_token_ids": prompt}, SamplingParams(max_tokens=4, detokenize=False))])
    (steps,) = seen.steps.values()
    assert {5, 17} <= set(np.concatenate([positions for positions, _ in islice(steps, 1)]))
