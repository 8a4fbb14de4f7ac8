"""Tokens that are taken back: with every policy, whoever shares the batch, and seen by nobody else."""

import random
from itertools import product

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from tests.engine.batches import POLICIES
from tests.engine.capture import capturing  # noqa: F401 - a fixture
from tests.engine.matrix import assert_answers_are_those_alone
from tests.engine.pretended_gpu import Step, pretended, states
from tests.engine.running import Watching, runner_of, tokens
from tests.soak.requests import SMALL
from tests.tiers import slow
from vllm_dlm.canvas.revision import Revocation
from vllm_dlm.canvas.stream import Stream
from vllm_dlm.methods import methods
from vllm_dlm.plugins.decoding.base import Proposal, Turn
from vllm_dlm.plugins.decoding.wino import AT_FIRST, Wino
from vllm_dlm.step.packing import split

#: with which random models fill several tokens at once and take some back
EAGER = {"dlm_decoding": "wino", "dlm_tau1": 0.02, "dlm_tau2": 0.4, "dlm_block_length": 12}


def request(rng: random.Random, extra: dict, length: int = 24, **fields):
    usual = {"temperature": 0, "ignore_eos": True}
    params = SamplingParams(max_tokens=length, detokenize=False, extra_args=EAGER | extra, **(usual | fields))
    return {"prompt_token_ids": [rng.randrange(390) for _ in range(rng.randint(1, 90))]}, params


class Commits(Watching):
    """Of requests: forwards, and tokens that were taken back."""

    def __enter__(self):
        self.forwards = self.revoked = self.shadows = 0
        self.held = {}
        return super().__enter__()

    def step_begins(self, states):
        for state in states:
            tokens = state.canvas.tokens
            old = self.held.get(state.req_id, tokens)
            mask = state.canvas.mask_id
            self.revoked += int(((old != mask) & (tokens == mask)).sum())
            self.held[state.req_id] = tokens.copy()

    def step_ended(self, requests, counts):
        self.forwards += len(requests)
        self.shadows += sum(len(request.added_by(Revocation.name)) for request in requests)


@pytest.mark.parametrize("checkpoint", ["dream-tiny", *slow("llada-tiny", "llada-tiny-gqa")])
def test_every_policy_extent_and_selection_in_one_batch(engines, checkpoint):
    """Guided and sampled ones, too; beside requests that take nothing back."""
    rng, llm = random.Random(3), engines(checkpoint, additional_config={"dlm": {"selection": dict(UNIQUE)}})
    given = []
    for index, (reuse, selection) in enumerate(product(POLICIES, ["none", "unique"])):
        extra = {"dlm_reuse": reuse, "dlm_selection": selection}
        extra |= [{}, {"dlm_cfg_scale": 0.5}, {"dlm_window": 2}][index % 3]
        extra |= {"dlm_decoding": "low_confidence", "dlm_tau1": None, "dlm_tau2": None} if index % 5 == 4 else {}
        sampled = {"temperature": 0.7, "seed": index} if index % 4 == 3 else {}
        given.append(request(rng, {key: value for key, value in extra.items() if value is not None}, **sampled))
    for _, params in given:  # of another decoding, which has no such fields
        if params.extra_args["dlm_decoding"] != "wino":
            for name in ("dlm_tau1", "dlm_tau2"):
                params.extra_args.pop(name, None)
    with Commits(llm) as commits:
        assert_answers_are_those_alone(llm, given)
    assert commits.shadows and commits.revoked


UNIQUE = {"name": "unique"} | {field: SMALL[field] for field in SMALL if hasattr(methods("selection")["unique"], field)}


@pytest.mark.parametrize("reuse", POLICIES)
def test_nobody_sees_a_shadow(engines, monkeypatch, reuse):
    """Where nothing is taken back, answers are those of the rule alone."""
    rng, llm = random.Random(4), engines("llada-tiny")
    given = [request(rng, {"dlm_reuse": reuse, "dlm_tau2": 0.0}) for _ in range(3)]
    with Commits(llm) as judged:
        beside = tokens(llm, given)
    monkeypatch.setattr(Wino, "judges", lambda self, memory: False)
    with Commits(llm) as plain:
        assert tokens(llm, given) == beside
    assert judged.shadows and not plain.shadows and judged.forwards == plain.forwards and not judged.revoked


@pytest.mark.parametrize("reuse", POLICIES)
def test_a_step_that_is_split_has_shadows_behind_their_canvases(engines, monkeypatch, reuse):
    rng, llm = random.Random(5), engines("llada-tiny")
    given = [request(rng, {"dlm_reuse": name}) for name in (reuse, "none", reuse)]
    wanted = tokens(llm, given)
    parts = []

    def one_by_one(streams: list[Stream], max_rows: int):
        parts.append([stream.hidden_row is not None for stream in streams])
        return split(streams, 1)

    monkeypatch.setattr("vllm_dlm.step.denoiser.split", one_by_one)
    for cache in runner_of(llm).kv_caches:
        cache.fill_(torch.nan)
    assert tokens(llm, given) == wanted
    assert any(any(part) for part in parts) and all(part == sorted(part) for part in parts)


def test_captured_steps_are_replayed_before_their_shadows(engines, capturing):  # noqa: F811
    rng, llm = random.Random(6), engines("llada-tiny")
    given = [request(rng, {"dlm_reuse": "fast_dllm/dual"}) for _ in range(3)]
    wanted = tokens(llm, given)
    captured = capturing(llm)
    with Commits(llm) as commits:
        assert tokens(llm, given) == wanted
    assert captured.steps and commits.shadows and commits.revoked


def test_an_end_that_may_be_taken_back_is_not_handed_out(engines):
    """Every token is an end here: what leaves is the first of a finished block, which other decodings need not wait
    for."""
    rng, llm = random.Random(7), engines("llada-tiny")
    ends = {"stop_token_ids": list(range(1, 400)), "ignore_eos": False}
    given = request(rng, {}, **ends)
    whole = given[0], request(rng, {})[1]
    with Commits(llm) as commits:
        (got,) = tokens(llm, [given])
    with Commits(llm) as of_all:
        (all_,) = tokens(llm, [whole])
    assert got == all_[: len(got)] and len(got) < len(all_)
    first_block = commits.forwards
    assert 1 < first_block < of_all.forwards and commits.revoked


def test_forwards_are_bounded_by_masks(engines):
    """However much is taken back."""
    rng, llm = random.Random(8), engines("llada-tiny")
    for tau1 in (0.0, 0.02, 0.1):
        with Commits(llm) as commits:
            tokens(llm, [request(rng, {"dlm_tau1": tau1, "dlm_tau2": 1.0, "dlm_block_length": 24})])
        assert commits.revoked and commits.forwards <= 24


def test_what_is_filled_and_what_is_taken_back():
    rule = Wino(tau1=0.5, tau2=0.8)
    memory = rule.memory()
    prob = np.linspace(0.4, 0.99, 40, dtype=np.float32)
    turn = Turn(0, 1, 1, np.arange(40))
    chosen = rule.choose(Proposal(prob, prob, prob), turn, lambda: None)
    assert sorted(chosen) == list(range(20, 40))  # of 33 that are trusted, and 28 by their share
    assert list(rule.choose(Proposal(prob[:3], prob[:3], prob[:3]), turn, lambda: None)) == [2]
    assert memory.last == AT_FIRST and rule.judges(memory)
    assert rule.revoked(np.zeros((1, 0)), 3, memory).tolist() == [] and memory.last == 3
    assert sorted(rule.revoked(np.array([[0.7, 0.9, 0.1, 0.5]]), 4, memory)) == [2, 3]  # fewer than three
    assert rule.revoked(np.array([[0.1, 0.1]]), 1, memory).tolist() == [] and not rule.judges(memory)


def test_shadows_wait_for_nothing_on_a_gpu(monkeypatch):
    given = states(4, {"dlm_decoding": "wino", "dlm_reuse": "fast_dllm"})
    with pretended(monkeypatch):
        watched = Step(given).run()
    launched = watched.of_layer(1)
    print(*launched, sep="\n  ")
    assert "vllm_dlm::shadow_attention" in launched and len(launched) <= 16, launched
