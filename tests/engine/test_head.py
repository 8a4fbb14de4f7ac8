"""The head: bounded memory, and chunks that change nothing."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_dlm.canvas import noise
from vllm_dlm.canvas.canvas import Canvas
from vllm_dlm.canvas.denoising import Denoising
from vllm_dlm.canvas.stream import Reading, Sampling
from vllm_dlm.options import request_options, server_options
from vllm_dlm.step.head import Head

VOCABULARY, WIDTH = 4096, 32
SERVER = server_options(None, "low_confidence")


@pytest.fixture(scope="module")
def weight():
    return torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0))


def request(length: int, start: int, temperature: float = 0.0, **extra) -> Reading:
    sampling = Sampling(temperature, 1.0, 0, seed=length, stop_ids=frozenset())
    state = Denoising("r", Canvas(request_options(SERVER, extra), 0, 0, [], length), sampling)
    return Reading(state, np.arange(length), np.arange(start, start + length))


def run(weight, hidden, requests, max_logits):
    largest = 0

    def logits(rows):
        nonlocal largest
        largest = max(largest, len(rows) * VOCABULARY)
        return rows @ weight.T

    config = SimpleNamespace(vocab_size=VOCABULARY, eos_token_id=1, eot_token_id=2, mask_token_id=0)
    Head(logits, config, max_logits).run(hidden, requests)
    return largest


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("algorithm", ["low_confidence", "random", "entropy", "topk_margin", "origin"])
def test_chunks_change_nothing(weight, temperature, algorithm):
    hidden = torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(1))
    results = []
    for max_logits in (1 << 30, 7 * VOCABULARY):
        requests = [request(60, 0, temperature, dlm_decoding=algorithm), request(40, 60, dlm_decoding=algorithm)]
        largest = run(weight, hidden, requests, max_logits)
        assert largest <= max_logits
        results.append(requests)
    for whole, pieces in zip(*results, strict=True):
        np.testing.assert_array_equal(whole.proposal.token, pieces.proposal.token)
        np.testing.assert_allclose(whole.proposal.score, pieces.proposal.score, atol=1e-5)


def test_peak_memory_does_not_grow_with_the_canvas(weight):
    """Bytes the head allocates at once, measured, for canvases of 64 and of 4,096 masked rows."""
    peaks = []
    for length in (64, 4096):
        hidden = torch.zeros(length, WIDTH)
        requests = [request(length, 0, temperature=1.0)]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run(weight, hidden, requests, max_logits=32 * VOCABULARY)
        peaks.append(peak_bytes(profile))
    per_row = 3 * 8 + 64  # the reduced results and the row table do grow, by a few numbers per row
    assert peaks[1] - peaks[0] <= 4096 * per_row * 4
    assert peaks[1] < 4096 * VOCABULARY * 4 / 8, "far below the logits of the whole canvas"


def peak_bytes(profile) -> int:
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


@pytest.mark.parametrize("algorithm", ["low_confidence", "entropy"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_mask_is_never_proposed(weight, algorithm, temperature):
    """A model that finds the mask most likely still fills the position, with the next token."""
    hidden = weight[0].expand(4, WIDTH) * 9  # the mask's own row: its logit is the largest by far
    assert ((hidden @ weight.T).argmax(-1) == 0).all()
    asked = request(4, 0, temperature, dlm_decoding=algorithm)
    run(weight, hidden, [asked], 1 << 30)
    assert (asked.proposal.token != 0).all() and np.isfinite(asked.proposal.prob).all()


def test_guidance_is_the_reference_formula(weight):
    hidden = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(2))
    guided = request(8, 0, dlm_cfg_scale=1.5)
    guided.guide_rows = np.arange(8, 16)
    run(weight, hidden, [guided], 1 << 30)
    conditional, unconditional = hidden[:8] @ weight.T, hidden[8:] @ weight.T
    combined = unconditional + 2.5 * (conditional - unconditional)
    np.testing.assert_array_equal(guided.proposal.token, combined.argmax(-1).numpy())


def row_keys(seed: int, block: int, step: int, positions) -> torch.Tensor:
    parts = (np.full(len(positions), part) for part in (seed, block, step))
    return torch.from_numpy(noise.row_keys(*parts, np.asarray(positions)))


class TestNoise:
    def test_pure_function_of_its_place(self):
        positions = torch.arange(5, 50)
        keys = row_keys(7, 1, 2, positions)
        torch.testing.assert_close(noise.exponential(keys, 100)[3], noise.exponential(keys[3:4], 100)[0])
        for other in (
            row_keys(8, 1, 2, positions),
            row_keys(7, 0, 2, positions),
            row_keys(7, 1, 3, positions),
        ):
            assert (keys != other).all()

    def test_exponential_distribution(self):
        draws = noise.exponential(row_keys(3, 0, 0, torch.arange(100)), 10_000).flatten()
        # mean 1 and variance 1, a million draws: standard errors 0.001 and 0.003
        assert abs(draws.mean() - 1) < 0.006 and abs(draws.var() - 1) < 0.02
        assert abs((draws > 3).double().mean() - np.exp(-3)) < 0.002
        assert (draws > 0).all() and torch.isfinite(draws).all()

    def test_rows_and_columns_are_independent(self):
        draws = noise.exponential(row_keys(3, 0, 0, torch.arange(200)), 2000)
        rows = torch.corrcoef(draws[:50])
        columns = torch.corrcoef(draws.T[:50])
        for matrix, bound in ((rows, 0.12), (columns, 0.35)):
            assert (matrix - torch.eye(50)).abs().max() < bound

    def test_uniform(self):
        draws = noise.uniform(row_keys(-5, 0, 0, torch.arange(100_000)))
        assert abs(draws.mean() - 0.5) < 0.005 and draws.min() >= 0 and draws.max() <= 1
