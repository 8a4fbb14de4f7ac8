"""LLaDA with experts: recorded runs of the official code, a statement of its router, and all methods."""

import json
import random
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from vllm import SamplingParams

from tests.conftest import GOLDEN
from tests.engine.matrix import assert_answers_are_those_alone, combinations
from tests.engine.running import Recorder, runner_of, tokens
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


def test_experts_of_each_row(llm):
    """In float64, one row at a time: the most probable experts, with their probabilities as they are."""
    weights = {k: v.double() for k, v in load_file(GOLDEN / "checkpoints" / CHECKPOINT / "model.safetensors").items()}
    runner, prefix = runner_of(llm), "model.layers.2.mlp"
    rows = torch.randn(23, 128, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), runner.forwards():
        got = runner.model.model.layers[2].feed_forward(rows.to(runner.device, copy=True)).cpu()
    for row, mine in zip(rows.double(), got, strict=True):
        prob = (weights[f"{prefix}.gate.weight"] @ row).softmax(0)
        wanted = torch.zeros(128, dtype=torch.float64)
        for expert in prob.argsort(descending=True)[:4].tolist():
            gate, up, down = (
                weights[f"{prefix}.experts.{expert}.{part}_proj.weight"] for part in ("gate", "up", "down")
            )
            wanted += prob[expert] * (down @ (F.silu(gate @ row) * (up @ row)))
        torch.testing.assert_close(mine.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["none", "unique"])
def test_every_decoding_with_every_reuse(engines, selection):
    given = list(combinations(selection))
    small = {"name": selection} | (
        {"min_context": 0, "page_size": 16, "budget_tokens": 64} if selection == "unique" else {}
    )
    assert_answers_are_those_alone(engines(CHECKPOINT, additional_config={"dlm": {"selection": small}}), given)


def test_holes_of_a_prompt_are_filled(llm):
    rng = random.Random(2)
    prompt = [rng.randrange(390) for _ in range(30)]
    prompt[5] = prompt[17] = 511
    with Recorder(llm) as seen:
        tokens(llm, [({"prompt_token_ids": prompt}, SamplingParams(max_tokens=4, detokenize=False))])
    (steps,) = seen.steps.values()
    assert {5, 17} <= set(np.concatenate([positions for positions, _ in islice(steps, 1)]))
