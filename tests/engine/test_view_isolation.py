"""A fault anywhere in the view inside an engine: everybody's tokens are as without a view, and the next request is
seen again. tests/view/test_isolation.py has the way from an engine's outputs to clients."""

import pytest

from tests.engine.matrix import combinations, small
from tests.engine.running import tokens
from tests.engine.test_view import assert_nothing_is_kept, every_step
from tests.engine.viewing import assert_told, generate, telling
from tests.view.test_isolation import IN_ENGINES, logged, raises
from vllm_dlm.methods import methods
from vllm_dlm.view.isolation import ENTRY_POINTS

__all__ = ["every_step", "logged"]
INSIDE = sorted(name for name in ENTRY_POINTS if name.startswith(IN_ENGINES))
SELECTION = sorted(name for name, selection in methods("selection").items() if selection.sparse)[0]


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("name", INSIDE)
def test_a_fault_inside_an_engine(engines, monkeypatch, logged, name, at):
    if at > 1 and name.endswith(("Trace.begins", "StepRecorder._attach", "Trajectories.take")):
        at = 1  # called rarely
    llm = engines("llada-tiny", additional_config={"dlm": {"selection": small("selection", SELECTION)}})
    given = list(combinations(SELECTION))[::9]
    assert len(given) >= 6
    expected = tokens(llm, given)
    called, faults = raises(name, monkeypatch, at), 1
    if name.endswith("Trajectories.take"):  # the message of another fault is all it is called for
        faults = 2
        raises(next(each for each in INSIDE if each.endswith("Trace.stepped")), monkeypatch)
    frames = 0 if "Trajectories" in name else 1
    outputs, told = generate(llm, [telling(one, dlm_frames=frames) if n % 2 else one for n, one in enumerate(given)])
    assert called() >= at, "this test does not reach the entry point"
    assert [tuple(output.outputs[0].token_ids) for output in outputs] == expected
    observed = list(zip(outputs, told, strict=True))[1::2]
    failed = [output for output, _ in observed if "error" in output.outputs[0].dlm]
    assert failed and all("injected" in output.outputs[0].dlm["error"]["message"] for output in failed)
    assert 1 <= len(logged) <= faults * len(failed)
    for output, own in observed if frames else ():
        assert len(own.errors) == (output in failed)
        if output not in failed:
            assert_told(output, own)
    assert_nothing_is_kept(llm)
    monkeypatch.undo()
    (output,), (own,) = generate(llm, [telling(given[1], dlm_frames=1)])
    assert tuple(output.outputs[0].token_ids) == expected[1] and not own.errors
    assert own.begun and own.frames[0]
