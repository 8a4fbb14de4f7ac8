"""Steps between refreshes, as a GPU would run them: nothing in them waits for the host, and launches are few."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from tests.engine.pretended_gpu import GPU, Step, pretended, states
from tests.engine.running import Recorder, runner_of
from vllm_dlm.integration.worker import warm_up
from vllm_dlm.integration.worker.warm_up import STEPS
from vllm_dlm.methods import methods
from vllm_dlm.plugins.decoding.roles import ShadowingDecoding
from vllm_dlm.step.layer import GroupLayer

#: launches of a layer between refreshes
MOST = {"none": 12, "fast_dllm": 12, "dllm_cache": 18, "dyllm": 22}
REUSES = sorted(methods("reuse"))


@pytest.mark.parametrize("reuse", REUSES)
def test_launches_of_a_layer(monkeypatch, reuse):
    with pretended(monkeypatch):
        watched = Step(states(4, {"dlm_reuse": reuse})).run()
    launched = watched.of_layer(1)
    print(f"{reuse}: {len(launched)} launches a layer, {len(watched.launched)} a step", *launched, sep="\n  ")
    assert len(launched) <= MOST.get(reuse, 22), launched


@pytest.mark.parametrize(
    ("added", "error", "words"),
    [
        ("nonzero", DynamicOutputShapeException, "nonzero"),
        ("item", DataDependentOutputException, "_local_scalar_dense"),
        ("upload", RuntimeError, "would upload"),
    ],
)
def test_a_wait_would_be_found(monkeypatch, added, error, words):
    """Of one that somebody adds to a layer."""
    similarity = GroupLayer.similarity

    def waiting(self, new, old):
        found = similarity(self, new, old)
        if added == "nonzero":
            torch.ops.aten.nonzero(found > 0)
        elif added == "item":
            found.amax().item()
        else:
            found + torch.zeros(len(found)).to(GPU)
        return found

    monkeypatch.setattr(GroupLayer, "similarity", waiting)
    with pretended(monkeypatch), pytest.raises(error, match=words):
        Step(states(2, {"dlm_reuse": "dyllm"})).run()


@pytest.fixture
def few_canvases(monkeypatch):
    """Those that a server is warmed up with are more, and take half a minute."""
    monkeypatch.setattr(warm_up, "CANVASES", (1, 3))


def test_every_policy_is_warmed_up(engines, few_canvases):
    """Two steps that refresh nothing, of one canvas and of many; and nobody's blocks are written to."""
    llm = engines("llada-tiny")
    runner = runner_of(llm)
    for cache in runner.kv_caches:
        cache.fill_(7)
    with Recorder(llm) as seen:
        runner.warm_up()
    names = {name.split()[0] for name in seen.steps}
    revoking = {name for name, decoding in methods("decoding").items() if issubclass(decoding, ShadowingDecoding)}
    assert revoking and names == set(methods("reuse")) | revoking
    assert all(len(steps) >= STEPS for steps in seen.steps.values())
    assert all((cache[1:] == 7).all() for cache in runner.kv_caches)


def test_a_policy_that_cannot_run_is_told_at_the_start(engines, few_canvases, monkeypatch):
    def broken(self, at):
        raise NotImplementedError("no kernel")
        yield

    told = []
    monkeypatch.setattr(
        "vllm_dlm.integration.worker.warm_up.logger.warning", lambda text, *args: told.append(text % args)
    )
    monkeypatch.setattr(methods("reuse")["dyllm"], "layer", broken)
    runner_of(engines("llada-tiny")).warm_up()
    (line,) = told
    assert line.startswith("Requests with reuse 'dyllm' will fail here: NotImplementedError: no kernel")
