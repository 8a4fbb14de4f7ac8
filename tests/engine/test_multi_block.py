"""Several open blocks: recorded runs of d3LLM's official code, token for token and step for step."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from vllm import SamplingParams

from tests.conftest import GOLDEN
from tests.engine.running import tokens
from tests.engine.test_rules_golden import Canvases
from vllm_dlm.canvas.canvas import Canvas, Commit
from vllm_dlm.methods import methods
from vllm_dlm.options import Options
from vllm_dlm.plugins.decoding.base import Proposal, Turn
from vllm_dlm.plugins.decoding.multi_block import CLOSED, FIRST, OPEN, MultiBlock
from vllm_dlm.plugins.reuse.delayed import Delayed

RUNS = json.loads((GOLDEN / "rules2/runs.json").read_text())["runs"]
RUNS = {name: run for name, run in RUNS.items() if run["method"] == "multi_block"}
#: Of the others only the rows are those of the published code: it reads the first of the rows of Dream at itself
#: instead of at the row before, and some keys twice; see docs/families.md
EXACT = [name for name, run in RUNS.items() if run["cache"] == "none" or run["family"] == "llada"]


def recorded(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "rules2/runs" / f"{name}.safetensors")


def fields(run: dict) -> dict:
    return {
        "open_length": run["block"],
        "max_entropy": run["threshold"],
        "add_at": run["block_add_threshold"],
        "activate_at": run["decoded_token_threshold"],
        "always_one": run["family"] == "llada",
        "end_stop": run["early_stop"],
    }


def delayed(run: dict) -> dict:
    """The cache of a run as a reuse policy"""
    return {
        "name": "delayed",
        "length": run["block"],
        "delay": run["cache_delay_iter"],
        "refresh_interval": run["refresh_interval"],
        "in_turn": run["family"] == "llada",
    }


@pytest.mark.parametrize("name", EXACT)
def test_recorded_run(engines, name):
    run, arrays = RUNS[name], recorded(name)
    extra = {"dlm_decoding": "multi_block", "dlm_block_length": "none"}
    params = SamplingParams(
        temperature=0,
        max_tokens=run["G"],
        ignore_eos=True,
        detokenize=False,
        extra_args=extra | {f"dlm_{field}": value for field, value in fields(run).items()},
        stop_token_ids=[run["eos_id"]] if run["early_stop"] else None,
    )
    reuse = {"name": "none"} if run["cache"] == "none" else delayed(run)
    llm = engines(run["model"], additional_config={"dlm": {"reuse": reuse}})
    with Canvases(llm) as canvases:
        (got,) = tokens(llm, [({"prompt_token_ids": arrays["prompt"].tolist()}, params)])
    answer = arrays["final"].tolist()
    assert list(got) == (answer[: answer.index(run["eos_id"]) + 1] if run["early_stop"] else answer)
    assert canvases.steps == arrays["canvas"].tolist()


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run["cache"] != "none"])
def test_rows_of_recorded_runs(name):
    """Forward for forward, without a model: the rows that the delayed cache recomputes, and with Dream's shift the row
    before them, which predicts the first one."""
    run, arrays = RUNS[name], recorded(name)
    fields = delayed(run)
    policy, shift = Delayed(**{key: fields[key] for key in fields if key != "name"}), int(run["family"] == "dream")
    others = methods("selection")["none"](), methods("extent")["full"]()
    options = Options(MultiBlock(block_length=None), policy, *others)
    canvas = Canvas(options, run["mask_id"], shift, arrays["prompt"].tolist(), run["P"] + run["G"])
    steps = [*arrays["canvas"].numpy(), np.r_[arrays["prompt"], arrays["final"]]]
    firsts = []
    for before, after in pairwise(steps):
        assert (canvas.tokens == before).all()
        firsts.append(int(canvas.plan.live[0]))
        assert canvas.plan.live[-1] == len(canvas) - 1 and len(canvas.plan.live) == len(canvas) - firsts[-1]
        filled = np.flatnonzero(before != after)
        canvas.apply(Commit(filled, np.ones(len(filled), np.float32), np.arange(len(filled)), after[filled]))
    assert firsts == [max(first - shift, 0) for first in arrays["fed_from"].tolist()]


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if not run["early_stop"]])
def test_rule_of_recorded_entropies(name):
    """Forward for forward, without a model: what is open and active, and what is filled. Also of runs with the delayed
    cache, which the rule does not know of."""
    run, arrays = RUNS[name], recorded(name)
    rule, start, mask = MultiBlock(**fields(run)), run["P"], run["mask_id"]
    memory, canvases = rule.memory(), arrays["canvas"].numpy()
    for forward, canvas in enumerate(canvases):
        masked = start + np.flatnonzero(canvas[start:] == mask)
        if name.endswith("duplicated_keys") and forward > 12:
            return  # the published code reads some keys twice from here on
        state = memory.columns(masked, canvas[masked])["state"].T.astype(np.float64)
        opened = (arrays["block_masks"][forward] >= 0).numpy()
        assert len(memory.active) == opened.sum()
        assert memory.active == arrays["block_active"][forward].bool().tolist()[: len(memory.active)]
        entropy = arrays["entropy"][forward].numpy()[masked - start]
        seen = state[0] != CLOSED
        assert np.isfinite(entropy[seen]).all()
        best = arrays["best"][forward].numpy()[masked - start]
        found = Proposal(best, -np.where(seen, entropy, np.inf), np.zeros(len(masked)), state)
        filled = rule.choose(found, Turn(forward, 99, 1, masked), lambda: None)
        after = canvases[forward + 1] if forward + 1 < len(canvases) else np.r_[canvas[:start], arrays["final"].numpy()]
        assert (masked[filled] == masked[after[masked] != mask]).all(), forward
        assert (best[filled] == after[masked[filled]]).all()


def test_positions_before_the_first_ones_are_blocks_too():
    """A step may read masks of the prompt that the steps before it had no rows for."""
    memory = MultiBlock(open_length=4, add_at=1, activate_at=1).memory()
    late, early = np.arange(20, 30), np.array([13, 18])
    assert memory.columns(late, late)["state"][:, 0].tolist() == [FIRST] * 4 + [CLOSED] * 6
    both = np.concatenate([early, late])
    assert memory.columns(both, both)["state"][:, 0].tolist() == [FIRST, OPEN] + [OPEN] * 4 + [CLOSED] * 6


def test_the_mask_token_ends_nothing(engines):
    """A request may name it as a stop token."""
    llm = engines("llada-tiny")
    mask = llm.model_config.hf_config.mask_token_id

    def answer(*stops: int) -> list[int]:
        options = {"dlm_decoding": "multi_block"}
        params = SamplingParams(
            temperature=0, max_tokens=20, detokenize=False, extra_args=options, stop_token_ids=list(stops)
        )
        return tokens(llm, [({"prompt_token_ids": list(range(5, 30))}, params)])

    assert answer(mask) == answer()
