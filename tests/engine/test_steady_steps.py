"""Steps between refreshes, as a GPU would run them: nothing in them waits for the host, and launches are few."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from tests.engine.pretended_gpu import GPU, Step, pretended, states
from vllm_dlm.engine.layer import GroupLayer
from vllm_dlm.methods import methods

#: launches of a layer between refreshes; with a selection, of a policy that has no more than nine without
MOST = {"none": 12, "fast_dllm": 12, "dllm_cache": 18, "dyllm": 22}
MOST_SELECTING = 16
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
