"""A fault anywhere in the view, on the way from the engine's outputs to a client: the answer is as without a view.

tests/engine/test_view_isolation.py does the same inside the engine. Both go through all entry points there are.
"""

import asyncio
import inspect
from collections.abc import Callable

import pytest

from tests.view.engine import completion, completions, filled, read, run, wanted
from vllm_dlm.integration import view as integration
from vllm_dlm.view import hub, isolation, observed, routes, seen, steps, streams, traces
from vllm_dlm.view.hub import HUB
from vllm_dlm.view.isolation import ENTRY_POINTS, Isolated, isolated

__all__ = ["completions"]
#: modules whose entry points an engine without a server reaches, see tests/engine/test_view_isolation.py
IN_ENGINES = (steps.__name__, traces.__name__, f"{integration.__name__}:Trajectories")
HERE = sorted(name for name in ENTRY_POINTS if not name.startswith(IN_ENGINES))


def raises(name: str, monkeypatch, at: int = 1) -> Callable[[], int]:
    """The entry point raises in its call `at`. -> how often it was called, asked for later"""
    entry, calls = ENTRY_POINTS[name], 0
    original = entry.__wrapped__

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise IndexError("injected")

    async def faulty_async(*args, **kwargs):
        count()
        return await original(*args, **kwargs)

    def faulty(*args, **kwargs):
        count()
        return original(*args, **kwargs)

    monkeypatch.setattr(entry, "__wrapped__", faulty_async if inspect.iscoroutinefunction(original) else faulty)
    return lambda: calls


@pytest.fixture
def logged(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(isolation.logger, "error", lambda text, *args: lines.append(text % args))
    return lines


@pytest.mark.parametrize("name", HERE)
def test_a_fault_between_engine_and_client(completions, monkeypatch, logged, name):
    options = {"dlm_frames": 1, "dlm_watch": 1, "dlm_trajectory": 1}

    async def main() -> None:
        served = completions()
        called = raises(name, monkeypatch)
        steps = asyncio.ensure_future(served.engine.run())
        answers = []
        for _ in range(2):  # the second one comes after the fault
            answers.append(await read(await served.create(served, completion([5], 2, **options))))
        whole = await served.create(served, completion([6], 2, stream=False, dlm_trajectory=1))
        steps.cancel()
        assert called(), "this test does not reach the entry point"
        assert [tokens for tokens, _ in answers] == [{0: wanted([5]), 1: wanted([5])}] * 2
        assert whole.choices == [wanted([6])] * 2
        assert len(logged) == 1 and "injected" in logged[0]
        assert "cmpl-same" in logged[0] or "response" in logged[0]
        (_, first), (_, second) = answers
        errors = [message["error"]["message"] for message in first if "error" in message]
        told = whole.dlm if isinstance(whole.dlm, list) else [whole.dlm]
        errors += [message["error"]["message"] for message in told if "error" in message]
        # a fault in ending the request comes after all that its client reads
        assert all("injected" in error for error in errors) and bool(errors) == (not name.endswith(".end"))
        assert len([message for message in first if "begin" in message]) <= 2
        assert not [message for message in second if "error" in message]
        assert [filled(second, choice) for choice in range(2)] == [wanted([5])] * 2

    run(main())
    assert not HUB and not HUB.followers


def test_every_way_into_the_view_is_an_entry_point():
    """All methods of isolated objects that serving calls; what else these have is called by such methods, or listed."""
    plain = {
        # what ends the view after a fault
        "Trace.fail", "Canvas.fail", "Canvas.stop", "Canvas.end", "ObservedRequest.log", "ObservedRequest.fail",
        "Channel.fail", "StepRecorder.fail",
        # what hands out the result of an entry point, or an error
        "Trajectories.deliver", "Channel.news", "Channel.with_trajectories", "StepRecorder.attach", "StepRecorder.take",
        "StepRecorder.best",
        # what counts, or is called by routes alone
        "Channel.open", "Canvas.listed",
        # what entry points call
        "Channel.chunk", "Channel.own", "Canvas.trajectory", "Trace.own",
    }  # fmt: skip
    found = set()
    for module in (hub, integration, observed, routes, seen, steps, streams, traces):
        for cls in vars(module).values():
            if inspect.isclass(cls) and issubclass(cls, Isolated) and cls.__module__ == module.__name__:
                names = [name for name, value in vars(cls).items() if inspect.isfunction(value)]
                found |= {
                    f"{cls.__name__}.{name}"
                    for name in names
                    if not name.startswith("_") and f"{module.__name__}:{cls.__qualname__}.{name}" not in ENTRY_POINTS
                }
    assert found == plain


def test_what_no_process_survives_is_raised(monkeypatch, logged):
    monkeypatch.setattr(isolation, "poisons", lambda error: isinstance(error, ArithmeticError))

    class View(Isolated):
        subject = "a request"

        @isolated
        def divide(self, by: int) -> float:
            return [1.0][by] / by

    try:
        view = View()
        with pytest.raises(ZeroDivisionError):
            view.divide(0)
        assert view.fault is None and view.divide(2) is None
        assert "IndexError" in view.fault and len(logged) == 1
        assert view.divide(0) is None and len(logged) == 1  # it does nothing any more
    finally:
        del ENTRY_POINTS[f"{__name__}:{View.divide.__qualname__}"]
