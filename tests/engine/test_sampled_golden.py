"""The sampling formulas against recorded sampled runs, step by step, with the references' own noise order.

The served default draws other noise (a pure function of seed and position),
so the check is made where the two meet: logits of the recorded canvas and the
reference's random numbers in, the recorded next canvas out.
"""

import itertools

import numpy as np
import pytest
import torch

from tests.conftest import golden_tensors
from tests.engine.worker_calls import logits_of
from vllm_dlm.methods import methods
from vllm_dlm.plugins.decoding.base import LogitRows, Proposal, Turn

V = 512


class ReferenceOrder:
    """Draws as the reference does: from torch's global generator, over the whole canvas."""

    def __init__(self, family, length, candidates):
        self.family, self.length, self.candidates = family, length, candidates

    def exponential(self):
        if self.family == "llada":
            uniform = torch.rand(1, self.length, V, dtype=torch.float64)
            return -uniform[0, self.candidates].log()
        return torch.empty(len(self.candidates), V).exponential_(1).double()  # inside torch.multinomial

    def uniform(self):
        return torch.rand(1, self.length)[0, self.candidates]

    def random(self, count):
        return torch.rand(count).numpy()


def rows(draws, mask_id, temperature=0.0, top_p=1.0, top_k=V):
    count = len(draws.candidates)
    full = lambda value, dtype: torch.full((count,), value, dtype=dtype)  # noqa: E731
    return LogitRows(
        temperature=full(temperature, torch.float32),
        top_p=full(top_p, torch.float32),
        top_k=full(top_k, torch.int64),
        options=dict.fromkeys(("suppress_eos", "confidence_eos_eot_inf"), full(False, torch.bool)),
        eos_id=391,
        eot_id=395,
        mask_id=mask_id,
        sampled=temperature > 0,
        filtered=top_p < 1 or top_k < V,
        exponential=draws.exponential,
        uniform=draws.uniform,
    )


RUNS = {
    "llada.g32_b8_s32_t0.7_seed0": ("low_confidence", {"block_length": 8}, {"temperature": 0.7}, 0),
    "llada.g32_b8_s32_random_t0_seed0": ("random", {"block_length": 8}, {}, 0),
    "dream.entropy_s32_t0.2_p0.95_algtemp0_seed0": ("entropy", {}, {"temperature": 0.2, "top_p": 0.95}, 0),
    "dream.maskgit_s16_t0.6_k20_seed1": ("maskgit_plus", {}, {"temperature": 0.6, "top_k": 20}, 1),
    "dream.origin_s32_t0_seed0": ("origin", {}, {}, 0),
}


@pytest.mark.parametrize("name", RUNS)
def test_steps(engines, golden_runs, name):
    method, fields, sampling, seed = RUNS[name]
    family = name.split(".")[0]
    mask_id, shift = (392, 0) if family == "llada" else (397, 1)
    tensors, params = golden_tensors(name), golden_runs[name]["params"]
    # LLaDA records the canvas fed to each forward, Dream the canvas after it.
    final, prompt = tensors["final"][0], tensors["prompt"][0]
    if family == "llada":
        canvases = [*tensors["canvas_steps"][:, 0], final]
    else:
        start = torch.cat([prompt, torch.full((len(final) - len(prompt),), mask_id)])
        canvases = [start, *tensors["history"][:, 0]]
    steps = params["steps"]
    decoding = methods("decoding")[method](steps=steps, **fields)
    (logits,) = engines(f"{family}-tiny").collective_rpc(
        logits_of, args=([canvas.tolist() for canvas in canvases[:-1]],)
    )
    torch.manual_seed(seed)
    width = fields.get("block_length", len(final) - len(prompt))
    per_block = steps // ((len(final) - len(prompt)) // width)
    for step, (canvas, wanted) in enumerate(itertools.pairwise(canvases)):
        end = len(prompt) + (step // per_block + 1) * width
        candidates = np.flatnonzero(canvas[:end].numpy() == mask_id)
        draws = ReferenceOrder(family, len(canvas), candidates)
        proposal = decoding.propose(
            logits[step][np.maximum(candidates - shift, 0)].float(), rows(draws, mask_id, **sampling)
        )
        as_numpy = Proposal(proposal.token.numpy(), proposal.score.numpy(), proposal.prob.numpy())
        filled = np.flatnonzero((wanted != canvas).numpy()[candidates])  # the quota is what the recorded step filled
        assert (as_numpy.token[filled] == wanted.numpy()[candidates[filled]]).all(), f"step {step}"
        if len(filled) or method == "origin":
            chosen = decoding.choose(as_numpy, Turn(step, steps, len(filled), candidates), lambda draws=draws: draws)
            # Where scores tie (a nucleus of one token has entropy 0) torch.topk's order is its own affair.
            np.testing.assert_array_equal(np.sort(as_numpy.score[chosen]), np.sort(as_numpy.score[filled]), f"{step}")
            if len(np.unique(as_numpy.score)) == len(candidates):
                np.testing.assert_array_equal(np.sort(chosen), filled, f"step {step}")


def test_quotas_are_the_recorded_ones(golden_runs):
    for name, total in {
        "dream.entropy_s32_t0": 32,
        "dream.entropy_s16_t0": 32,
        "dream.maskgit_plus_s12_t0": 32,
    }.items():
        params, tensors = golden_runs[name]["params"], golden_tensors(name)
        history = tensors["history"][:, 0]
        left = [total, *(history == 397).sum(-1).tolist()]
        recorded = [a - b for a, b in itertools.pairwise(left) if a != b]
        assert methods("decoding")["entropy"]().quotas(total, params["steps"]) == recorded
