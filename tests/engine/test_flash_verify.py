"""Drafts that the next step verifies: recorded runs of Flash-dLLM's official code, and what holds for all of them."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from vllm import SamplingParams

from tests.conftest import GOLDEN
from tests.engine.running import Watching, tokens
from vllm_dlm.canvas.commit import NOTHING
from vllm_dlm.kernels.draft_attention import draft_attention, naive
from vllm_dlm.plugins.decoding.base import Proposal, Turn
from vllm_dlm.plugins.decoding.flash_verify import FlashVerify

RUNS = json.loads((GOLDEN / "rules2/runs.json").read_text())["runs"]
NAMES = [name for name, run in RUNS.items() if run["method"] in ("flash_verify", "flash_cache")]


@pytest.mark.parametrize("name", NAMES)
def test_rule_of_recorded_probabilities(name):
    """Forward for forward, without a model: what a step fills, what it drafts, and which drafts are filled."""
    run, arrays = RUNS[name], load_file(GOLDEN / "rules2/runs" / f"{name}.safetensors")
    arrays = {key: value.numpy() for key, value in arrays.items()}
    gamma = 0.8 if run["gamma"] is None else run["gamma"]
    rule = FlashVerify(threshold=run["threshold"], window_length=run["block"], verify_threshold=gamma)
    canvases = [*arrays["canvas"], arrays["canvas"][-1].copy()]
    canvases[-1][run["P"] :][: len(arrays["final"])] = arrays["final"]
    drafted, wanted, end = 0, NOTHING, run["P"] + run["G"]
    for forward, verifies in enumerate(arrays["is_verify"]):
        after = np.flatnonzero((canvases[forward] == run["mask_id"]) & (canvases[forward + 1] != run["mask_id"]))
        # the end is the last of the first end tokens that are filled at once; here it is the first one
        ends = [position for position in after if canvases[forward + 1][position] == run["eos_id"]]
        before, end = end, max(ends) if ends and end == run["P"] + run["G"] else end
        if verifies:
            probabilities = arrays["verify_prob"][forward][: len(wanted)]
            assert wanted[: rule.accepted(probabilities)].tolist() == [p for p in wanted if p in after]
            drafted += len(after)
            continue
        place = np.argsort(window := arrays["rows"][forward][: arrays["window_rows"][forward]])
        masked = np.flatnonzero(canvases[forward][: run["P"] + run["G"]] == run["mask_id"])
        assert window[place].tolist() == masked[: len(window)].tolist()
        before_end = window[place] < before
        positions, prob = window[place][before_end], arrays["confidence"][forward][place][before_end]
        found = Proposal(arrays["best"][forward][place][before_end], prob, prob)
        filled = np.sort(rule.choose(found, Turn(forward, 99, 1, positions), lambda: None))
        assert positions[filled].tolist() == after.tolist(), forward
        wanted = positions[rule.drafts(prob, filled)]
        if run["gamma"] is not None:
            rows = arrays["rows"][forward + 1][arrays["tracked_rows"][forward + 1] :]
            assert wanted.tolist() == rows[rows >= 0][: len(wanted)].tolist()
    assert drafted == run["accepted_by_verify"]


def test_the_kernel_is_its_definition():
    torch.manual_seed(0)
    counts, lengths = [3, 2, 1], [20, 9, 33]
    queries = [6, 2, 2]  # the last layer has those of masks alone
    cache = torch.randn(12, 2, 16, 2 * 8)
    tables = [torch.tensor([5, 1]), torch.tensor([7]), torch.tensor([2, 3, 9])]
    drafted = [torch.randperm(length)[:count] for count, length in zip(counts, lengths, strict=True)]
    rows = torch.tensor([0, 1, 2, 3, 4, 5, 2, 3, 0, 1])
    q, k, v = torch.randn(10, 4, 8), torch.randn(12, 2, 8), torch.randn(12, 2, 8)
    given = queries, rows, k, v, drafted, cache, tables, lengths, 0.3
    got, wanted = draft_attention(q, *given), naive.draft_attention(q, *given)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    alone = draft_attention(q[6:8], [2], rows[6:8], k[6:10], v[6:10], drafted[1:2], cache, tables[1:2], [9], 0.3)
    assert torch.equal(alone, got[6:8])


class Judged(Watching):
    """Steps, accepted drafts, and for drafts that are proposed again: (probability, the canvas's own)"""

    def __enter__(self):
        self.steps, self.pairs, self.drafts = 0, [], 0
        return super().__enter__()

    def step_ended(self, readings, counts):
        for reading in readings:
            self.steps += 1
            for judged in reading.added_by("verification"):
                self.drafts += len(judged.positions)
                place = np.searchsorted(reading.positions, judged.positions)
                again = reading.proposal.token[place] == judged.tokens
                self.pairs += zip(judged.proposal.noted[0][again], reading.proposal.prob[place][again], strict=True)


def asked(count: int = 4, new: int = 24, **fields):
    params = SamplingParams(
        temperature=0,
        max_tokens=new,
        ignore_eos=True,
        detokenize=False,
        extra_args={"dlm_decoding": "flash_verify", "dlm_threshold": 0.7}
        | {f"dlm_{name}": value for name, value in fields.items()},
    )
    return [({"prompt_token_ids": list(range(5 + n, 40 + 7 * n))}, params) for n in range(count)]


@pytest.mark.parametrize("reuse", ["none", "fast_dllm"])
def test_a_single_draft_is_judged_as_the_canvas_itself(engines, reuse):
    """Its mask attends to what the row of the canvas attends to, whatever is cached."""
    with Judged(engines("llada-tiny")) as seen:
        tokens(engines("llada-tiny"), asked(window_length=2, verify_threshold=1.0, reuse=reuse))
    assert len(seen.pairs) > 10
    judged, own = np.array(seen.pairs).T
    np.testing.assert_allclose(judged, own, atol=1e-5)


def test_drafts_save_steps(engines):
    """None of them is certain, so that a product of 1 fills none; a product of 0 fills all."""
    llm, steps = engines("llada-tiny"), {}
    for share in (0.0, 0.3, 1.0):
        given = asked(window_length=8, verify_threshold=share)
        with Judged(llm) as seen:
            got = tokens(llm, given)
        steps[share] = seen.steps
        assert seen.drafts > 0
        assert [tokens(llm, [one]) for one in given] == [[want] for want in got]
    assert steps[0.0] < steps[0.3] < steps[1.0]


@pytest.mark.parametrize("more", [{"cfg_scale": 0.5}, {"temperature": 0.8}])
def test_what_has_no_drafts(engines, more):
    llm, given = engines("llada-tiny"), asked(2, 8, **{k: v for k, v in more.items() if k != "temperature"})
    for _, params in given:
        params.temperature = more.get("temperature", 0)
    with Judged(llm) as seen:
        got = tokens(llm, given)
    assert seen.drafts == 0 and all(len(one) == 8 for one in got)
