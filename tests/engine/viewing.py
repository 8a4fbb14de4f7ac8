"""Requests of an engine in this process, and what those who follow them are sent."""

import asyncio
import json
from itertools import count, pairwise
from types import SimpleNamespace

from vllm.sampling_params import RequestOutputKind

from vllm_dlm.integration.view import ADDED
from vllm_dlm.options.limits import Limits
from vllm_dlm.view.frames import Replay
from vllm_dlm.view.hub import HUB, Follower
from vllm_dlm.view.observed import ObservedRequest

NUMBERS = count()


class Told(Follower):
    """Reads everything as it comes, of each choice."""

    def __init__(self, choices: int = 1):
        super().__init__()
        self.begun, self.frames, self.ended, self.errors = [], [[] for _ in range(choices)], [], []

    def notify(self, at_once: bool = False) -> None:
        for choice, data in asyncio.run(self.take()):
            message = json.loads(data)
            if "begin" in message:
                self.begun.append(message["begin"])
            elif "end" in message:
                self.ended.append(message["end"])
            elif "error" in message:
                self.errors.append(message["error"]["message"])
            else:
                self.frames[choice].append(message)

    def replayed(self, choice: int = 0) -> dict[int, list]:
        replay = Replay(0)
        for frame in self.frames[choice]:
            replay.apply(frame)
        return replay.filled


def telling(request, **options):
    """The same request, which tells of its steps."""
    prompt, params = request
    params = params.clone()
    params.extra_args = (params.extra_args or {}) | ({"dlm_frames": 1, "dlm_trajectory": 1} | options)
    return prompt, params


def start(llm, request) -> tuple[str, Told | None]:
    """-> its name, and its follower if it tells of its steps"""
    prompt, params = request[0], request[1].clone()
    params.output_kind = RequestOutputKind.FINAL_ONLY
    name, told = f"view-{next(NUMBERS)}", None
    if not (params.extra_args or {}).get("dlm_frames"):
        llm.llm_engine.add_request(name, prompt, params)
        return name, None
    told = Told(params.n)
    token = ADDED.set([admitted(params.n, told)])
    try:
        llm.llm_engine.add_request(name, prompt, params)
    finally:
        ADDED.reset(token)
    return name, told


def admitted(choices: int, follower: Follower, **options) -> ObservedRequest:
    """In the hub as the request of a stream with frames is"""
    asked = SimpleNamespace(**{"frames": True, "watch": False, "observed": True, "trajectory": False} | options)
    channel = SimpleNamespace(follower=follower, open=lambda choices: 0, trajectories={})
    request = ObservedRequest("request", "test", choices, asked, channel)
    HUB.admit(request, Limits(observed=1 << 20, followers=1 << 20))
    return request


def finish(llm, meanwhile=None) -> dict:
    """name -> the finished output; `meanwhile(step)` before each"""
    done, step = {}, 0
    while llm.llm_engine.has_unfinished_requests():
        if meanwhile is not None:
            meanwhile(step)
        done |= {output.request_id: output for output in llm.llm_engine.step() if output.finished}
        step += 1
    HUB.remove(list(HUB.admitted))
    return done


def generate(llm, requests, meanwhile=None):
    """-> outputs, and followers of those that tell"""
    started = [start(llm, request) for request in requests]
    done = finish(llm, meanwhile)
    return [done[name] for name, _ in started], [told for _, told in started]


def assert_told(output, told: Told, choice: int = 0) -> None:
    """The frames of a choice lead to its tokens, and say when each was filled as its trajectory does."""
    completion, filled = output.outputs[choice], told.replayed(choice)
    length = len(completion.token_ids)
    assert [filled[at][1] for at in range(length)] == list(completion.token_ids)
    assert [filled[at][-1] for at in range(length)] == completion.dlm["trajectory"]
    for frame in told.frames[choice]:
        assert_sound(frame, told.begun[choice])


def assert_sound(frame: dict, begin: dict) -> None:
    first, end = -begin["prompt_tokens"], begin["canvas"]
    for kind in ("set", "edited"):
        assert all(first <= at < end and (p is None or 0 <= p <= 1.0001) for at, _, _, p, _ in frame[kind])
    told = [entry[0] for kind in ("set", "unset", "edited") for entry in frame[kind]]
    assert len(told) == len(set(told))
    masked = [at for at, *_ in frame["guesses"]]
    assert not set(masked) & {entry[0] for kind in ("set", "edited") for entry in frame[kind]}
    for _, text, _, others in frame["guesses"]:
        assert len(others) <= 3 and isinstance(text, str)
    rows, keys = frame["rows"], frame["keys"]
    assert rows["recomputed"] >= 0 and rows["live"] > 0 and rows["dense"] > 0  # perhaps nothing moved
    assert 0 <= keys["read"] <= keys["of"]
    for shares in frame["heat"].values():
        assert all(first <= a <= b < end and 0 < share <= 1 for a, b, share in shares)
        assert all(before[1] < after[0] for before, after in pairwise(shares))
