"""Requests of an engine in this process, and what those who follow them are told."""

from itertools import count, pairwise

from vllm.sampling_params import RequestOutputKind

from vllm_dlm.view.frames import Replay
from vllm_dlm.view.hub import HUB, Follower, Request

NUMBERS = count()


class Told(Follower):
    """Keeps everything, of each choice."""

    def __init__(self, choices: int = 1):
        super().__init__()
        self.begun, self.frames, self.ended = [], [[] for _ in range(choices)], []

    def begin(self, message):
        self.begun.append(message["begin"])

    def frame(self, choice, frame):
        self.frames[choice].append(frame)

    def end(self, message):
        self.ended.append(message["end"])

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
    if (params.extra_args or {}).get("dlm_frames"):
        told = Told(params.n)
        HUB.add(Request(name, "test", params.n, False, told, 0))
    llm.llm_engine.add_request(name, prompt, params)
    return name, told


def finish(llm, meanwhile=None) -> dict:
    """name -> the finished output; `meanwhile(step)` before each"""
    done, step = {}, 0
    while llm.llm_engine.has_unfinished_requests():
        if meanwhile is not None:
            meanwhile(step)
        done |= {output.request_id: output for output in llm.llm_engine.step() if output.finished}
        step += 1
    for request in list(HUB.requests.values()):
        HUB.remove(request)
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
