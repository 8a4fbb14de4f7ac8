"""Rules that fill as many tokens as they trust, against recorded runs of published code."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from vllm import SamplingParams

from tests.conftest import GOLDEN
from tests.engine.running import Recorder, Watching, tokens
from vllm_dlm.plugins.decoding.base import LogitRows, Proposal, Turn
from vllm_dlm.plugins.decoding.credit import Credit
from vllm_dlm.plugins.decoding.hierarchy import Hierarchy
from vllm_dlm.plugins.decoding.local_leap import LocalLeap

RUNS = json.loads((GOLDEN / "rules" / "runs.json").read_text())["runs"]


def arrays(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "rules" / "runs" / f"{name}.safetensors")


def of(method: str) -> list[str]:
    return [name for name, run in RUNS.items() if run["method"] == method]


def answered(engines, run: dict, prompt: torch.Tensor, algorithm: str, **fields) -> tuple[list[int], int]:
    """Tokens, and forwards that read logits"""
    reuse = {"name": "none"} if run["cache"] == "none" else {"name": "fast_dllm", "cache": run["cache"]}
    llm = engines(run["model"], additional_config={"dlm": {"reuse": reuse}})
    params = SamplingParams(
        temperature=0,
        max_tokens=run["G"],
        ignore_eos=True,
        detokenize=False,
        extra_args={
            "dlm_decoding": algorithm,
            "dlm_block_length": run["block"],
            **{f"dlm_{key}": "none" if value is None else value for key, value in fields.items()},
        },
    )
    with Recorder(llm) as recorder:
        (got,) = tokens(llm, [({"prompt_token_ids": prompt.tolist()}, params)])
    (steps,) = recorder.steps.values()
    return list(got), len(steps)


@pytest.mark.parametrize("name", of("hierarchy"))
def test_hierarchy(engines, name):
    run, recorded = RUNS[name], arrays(name)
    got, forwards = answered(
        engines, run, recorded["prompt"], "hierarchy", low=run["low_threshold"], high=run["threshold"]
    )
    assert got == recorded["final"].tolist()
    if run["cache"] == "none":  # with a cache the official loop makes one more for each block
        assert forwards == run["n_forward_useful"]


def test_hierarchy_of_recorded_logits():
    """Forward for forward, without a model."""
    name = "hierarchy.G32B8t0.9l0.4"
    run, recorded = RUNS[name], arrays(name)
    rule = Hierarchy(low=run["low_threshold"], high=run["threshold"])
    for forward, (logits, after, (start, end)) in enumerate(
        zip(recorded["block_logits"], recorded["block_after"], recorded["block_range"].tolist(), strict=True)
    ):
        masked = np.flatnonzero(recorded["canvas"][forward, start:end] == run["mask_id"])
        prob, token = logits.softmax(-1).max(-1)
        prob, token = prob.numpy()[masked], token.numpy()[masked]
        filled = rule.choose(Proposal(token, prob, prob), Turn(forward, 99, 1, start + masked), lambda: None)
        block = recorded["canvas"][forward, start:end].numpy().copy()
        block[masked[filled]] = token[filled]
        assert block.tolist() == after.tolist(), forward


@pytest.mark.parametrize("name", of("credit"))
def test_credit(engines, name):
    run, recorded = RUNS[name], arrays(name)
    fields = {key: run[key] for key in ("alpha", "gamma", "beta", "threshold")}
    got, forwards = answered(engines, run, recorded["prompt"], "credit", **fields)
    assert got == recorded["final"].tolist()
    if run["cache"] == "none":
        assert forwards == run["n_forward_useful"]


@pytest.mark.parametrize("name", ["credit.G32B8t0.9", "credit.calm_G32B16t0.3"])
def test_credit_of_recorded_logits(name):
    """Forward for forward, without a model."""
    run, recorded = RUNS[name], arrays(name)
    rule = Credit(**{key: run[key] for key in ("alpha", "gamma", "beta", "threshold")})
    block, memory = None, None
    for forward, (logits, after, (start, end)) in enumerate(
        zip(recorded["block_logits"], recorded["block_after"], recorded["block_range"].tolist(), strict=True)
    ):
        if block != start:
            block, memory = start, rule.memory()
        canvas = recorded["canvas"][forward, start:end].numpy().copy()
        masked = np.flatnonzero(canvas == run["mask_id"])
        columns = {
            key: torch.from_numpy(column) for key, column in memory.columns(start + masked, canvas[masked]).items()
        }
        found = rule.propose(logits[masked].clone(), rows_of(rule, len(masked), run, columns))
        proposal = Proposal(found.token.numpy(), found.score.numpy(), found.prob.numpy())
        memory.note(start + masked, found.noted.numpy())
        filled = rule.choose(proposal, Turn(forward, 99, 1, start + masked), lambda: None)
        canvas[masked[filled]] = proposal.token[filled]
        assert canvas.tolist() == after.tolist(), forward


def rows_of(rule, count: int, run: dict, memory: dict) -> LogitRows:
    numbers = {key: torch.full((count,), getattr(rule, key)) for key in ("alpha", "gamma", "beta")}
    flags = {key: torch.zeros(count, dtype=torch.bool) for key in ("suppress_eos", "confidence_eos_eot_inf")}
    off = torch.zeros(count)
    return LogitRows(
        temperature=off,
        top_p=off + 1,
        top_k=off.long() + 512,
        options=numbers | flags,
        eos_id=run["eos_id"],
        eot_id=None,
        mask_id=run["mask_id"],
        sampled=False,
        filtered=False,
        exponential=None,
        uniform=None,
        memory=memory,
    )


@pytest.mark.parametrize("name", of("local_leap_variant"))
def test_leaps_from_one_anchor(engines, monkeypatch, name):
    """The recorded code takes the best position alone as an anchor; beside it the rule is the published one."""
    published = LocalLeap.choose

    def from_the_best(self, proposal, turn, rng):
        below = np.nextafter(np.float32(self.kappa), np.float32(0))
        prob = np.minimum(proposal.prob, below)
        best = proposal.prob.argmax()
        prob[best] = proposal.prob[best]
        return published(self, replace(proposal, prob=prob), turn, rng)

    monkeypatch.setattr(LocalLeap, "choose", from_the_best)
    run, recorded = RUNS[name], arrays(name)
    got, forwards = answered(
        engines, run, recorded["prompt"], "local_leap", kappa=run["kappa"], tau=run["tau"], radius=run["radius"]
    )
    assert got == recorded["final"].tolist() and forwards == run["n_forward"]


class Rows(Watching):
    """The positions that the rows of each step stand for."""

    def __enter__(self):
        self.steps = []
        return super().__enter__()

    def step_begins(self, states):
        (state,) = states
        canvas, live = state.canvas, state.canvas.plan.live
        self.steps.append(np.where(live == canvas.rows - 1, canvas.last, live).tolist())


@pytest.mark.parametrize("name", of("suffix_window"))
def test_suffix_window(engines, name):
    run, recorded = RUNS[name], arrays(name)
    extent = {"name": "window", "window": run["window"]}
    reuse = {"name": "fast_dllm", "cache": run["cache"]}
    llm = engines(run["model"], additional_config={"dlm": {"reuse": reuse, "extent": extent}})
    extra = {"dlm_block_length": run["block"]}
    if run["threshold"] is None:
        extra["dlm_steps"] = run["steps"]
    else:
        extra |= {"dlm_threshold": run["threshold"], "dlm_threshold_decay": run["alpha"]}
    if run["family"] == "dream":
        # what Dream's code takes where nobody says otherwise
        extra |= {"dlm_decoding": "maskgit_plus", "dlm_top_k": 50}
    params = SamplingParams(
        temperature=0,
        max_tokens=run["G"],
        ignore_eos=True,
        detokenize=False,
        extra_args=extra,
        stop_token_ids=[run["eos_id"]] if run["eos_exit"] else None,
    )
    with Rows(llm) as rows:
        (got,) = tokens(llm, [({"prompt_token_ids": recorded["prompt"].tolist()}, params)])
    final = recorded["final"].tolist()
    if run["eos_exit"]:  # the official loop ends the block first, and fills what is left with its end
        assert list(got) == final[: final.index(run["eos_id"]) + 1]
        return
    assert list(got) == final
    assert rows.steps == [[p for p in step if p >= 0] for step in recorded["query_positions"].tolist()]


@pytest.mark.parametrize("name", [name for name in of("freedave") + of("freedave_plus") if not RUNS[name]["eager"]])
def test_freedave(engines, name):
    """Texts, and with the dual cache of LLaDA forwards. Drafts need one; Dream's recorded code takes its first ones
    from a refresh, whose other proposals nobody reads here."""
    run, recorded = RUNS[name], arrays(name)
    fields = {"drafts": run["draft_steps"], "threshold": run["threshold"]}
    got, forwards = answered(engines, run, recorded["prompt"], "freedave", **fields)
    same = "final" if run["cache"] == "dual" or run["threshold"] is None else "final_same_threshold"
    assert got == recorded[same].tolist()
    if run["cache"] == "dual" and run["family"] == "llada":
        assert forwards == run["n_forward"]


class Canvases(Watching):
    """Tokens of the one request's canvas before each step."""

    def __enter__(self):
        self.steps = []
        return super().__enter__()

    def step_begins(self, states):
        (state,) = states
        self.steps.append(state.canvas.tokens.tolist())


@pytest.mark.parametrize("name", of("wino"))
def test_wino(engines, name):
    """Forward for forward: what is filled, and what is taken back."""
    run, recorded = RUNS[name], arrays(name)
    with Canvases(engines(run["model"], additional_config={"dlm": {"reuse": {"name": "none"}}})) as canvases:
        got, _ = answered(
            engines, run | {"cache": "none"}, recorded["prompt"], "wino", tau1=run["tau1"], tau2=run["tau2"]
        )
    assert got == recorded["final"].tolist()
    assert canvases.steps == recorded["canvas"].tolist()
