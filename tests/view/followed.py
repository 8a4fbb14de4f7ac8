"""Requests that the engine knows, what it tells of their steps, and followers of their canvases."""

import json
from collections import Counter
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from vllm_dlm.options.limits import Limits
from vllm_dlm.view.frames import Frame, Guesses, History
from vllm_dlm.view.hub import HUB, Follower
from vllm_dlm.view.observed import Canvas, ObservedRequest

PROMPT = 8


def request_of(choices: int = 1, limits: Limits | None = None, own: Follower | None = None, **options):
    """A request that the engine knows"""
    asked = {"frames": own is not None, "watch": True, "observed": True, "trajectory": False, "limits": Limits()}
    asked |= options
    channel = None if own is None else SimpleNamespace(follower=own, open=lambda choices: 0, trajectories={})
    request = ObservedRequest("request", "model", choices, SimpleNamespace(**asked), channel)
    HUB.admit(request, limits or Limits())
    request.bind(f"request-{len(HUB.requests)}", list(range(PROMPT)))
    return request


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    HUB.remove(list(HUB.admitted))
    for follower in HUB.followers.values():
        follower.close()
    assert not HUB and not HUB.followers


def begin(positions: int) -> bytes:
    return msgspec.msgpack.encode(
        {
            "begin": {
                "length": PROMPT + positions,
                "holes": [],
                "canvas": positions,
                "given": [],
                "reuse": "none",
                "selection": "none",
            },
        }
    )


def frame(step: int, positions: int) -> bytes:
    """Step k fills position k; all masks that are left have a guess."""
    at, length = np.array([PROMPT + step - 1]), PROMPT + positions
    left = np.arange(PROMPT + step, length)
    made = Frame(
        step,
        1,
        1,
        at,
        np.array([False]),
        np.array([True]),
        np.array([step]),
        np.array([0.5]),
        np.array([step]),
        np.ones(7),
        np.ones((2, length)),
        Guesses.build(left, left % 500, np.full(len(left), 0.5), np.ones((2, 4, len(left)))),
    )
    return msgspec.msgpack.encode({"frame": made.pack()})


def counted(monkeypatch) -> Counter:
    counts: Counter[str] = Counter()

    def count(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def counting(self, *args):
            counts[name] += 1
            return original(self, *args)

        monkeypatch.setattr(owner, name, counting)

    for owner, name in ((History, "since"), (Canvas, "_encode"), (Canvas, "_encode_begin")):
        count(owner, name)
    return counts


async def reads(follower: Follower) -> list[dict]:
    await follower.ready.wait()
    return [json.loads(data) for _, data in await follower.take()]


def watching(request: ObservedRequest, index: int = 0) -> Follower:
    follower = Follower()
    HUB.admit_follower(follower, Limits())
    follower.follow(request.canvases[index])
    return follower
