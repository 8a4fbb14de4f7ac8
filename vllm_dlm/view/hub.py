"""The front-end's side: who follows which request, and what they have not been told yet.

An engine's messages (traces.py) come to `Hub.take`; frames get their text there and go to everybody who follows. A
follower who does not keep up has one frame waiting, with all of them merged, and holds nobody up. All of it runs in
the thread of the server's event loop.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from vllm_dlm.view.frames import INTERVAL, Frame, Replay, merged

#: of a longer prompt the text is not told
LONGEST_PROMPT = 8192
Text = Callable[[int], str]


class Follower:
    """Somebody who is told what happens to some canvases: a stream's own client, or one who watches."""

    def __init__(self) -> None:
        self.begins: list[dict] = []
        self.waiting: dict[int, Frame] = {}  # of each choice
        self.ends: list[dict] = []
        self.ready = asyncio.Event()
        self.told = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, message: dict) -> None:
        self.begins.append(message)
        self._later()

    def frame(self, choice: int, frame: Frame) -> None:
        self.waiting[choice] = merged(self.waiting[choice], frame) if choice in self.waiting else frame
        self._later()

    def end(self, message: dict) -> None:
        self.ends.append(message)
        self.close()

    def close(self) -> None:
        """Nothing waits for its time any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.ready.set()

    def _later(self) -> None:
        """Ready, but not sooner than a while after the last time."""
        if self.ready.is_set() or self._timer is not None:
            return
        left = self.told + INTERVAL - time.monotonic()
        if left <= 0:
            self.ready.set()
        else:
            self._timer = asyncio.get_running_loop().call_later(left, self.close)

    def take(self) -> list[tuple[int, dict]]:
        """(choice, what is new), in order"""
        found = [(begin.pop("choice"), begin) for begin in self.begins]
        found += sorted(self.waiting.items())
        found += [(end.pop("choice"), end) for end in self.ends]
        self.begins, self.waiting, self.ends = [], {}, []
        self.told = time.monotonic()
        self.ready.clear()
        return found


class Followed:
    """One canvas: a choice of a request."""

    def __init__(self, request: "Request", index: int):
        self.request, self.index = request, index
        self.started = time.monotonic()
        self.begin: dict[str, Any] | None = None
        self.replay = Replay(0)
        self.followers: list[Follower] = []
        self.filled: list[int] = []  # the step of each delivered token

    @property
    def choice(self) -> int:
        """Of the response"""
        return self.request.first_choice + self.index

    @property
    def name(self) -> str:
        return self.request.name if self.request.choices == 1 else f"{self.request.name}.{self.index}"

    def take(self, message: dict, text: Text) -> None:
        if "filled" in message:
            self.filled += message["filled"]
        elif "begin" in message:
            self._begins(message["begin"], text)
        elif "frame" in message:
            frame = told(message["frame"], text)
            self.replay.apply(frame)
            for follower in self.followers:
                follower.frame(self.choice, frame)

    def _begins(self, begin: dict, text: Text) -> None:
        prompt = self.request.prompt
        given = [[position, token, text(token)] for position, token in begin["given"]]
        texts = [[text(token)] for token in prompt] if len(prompt) <= LONGEST_PROMPT else None
        named = {"request": self.name, "model": self.request.model, "prompt_tokens": len(prompt)}
        self.begin = named | begin | {"prompt": texts, "given": given}
        for follower in self.followers:
            follower.begin({"begin": self.begin, "choice": self.choice})

    def follow(self, follower: Follower) -> None:
        """From now on, and in one frame what was before."""
        self.followers.append(follower)
        if self.begin is not None:
            follower.begin({"begin": self.begin, "choice": self.choice})
        if (so_far := self.replay.so_far) is not None:
            follower.frame(self.choice, so_far)

    def end(self, reason: str | None, tokens: int) -> None:
        last = self.replay.last
        for follower in self.followers:
            follower.end({
                "end": {
                    "steps": last["step"] if last else 0,
                    "seconds": round(time.monotonic() - self.started, 3),
                    "tokens": tokens,
                    "finish_reason": reason,
                },
                "choice": self.choice,
            })  # fmt: skip
        self.followers = []

    def listed(self) -> dict[str, Any]:
        """As /dlm/requests has it"""
        begin = self.begin or {}
        return {
            "request": self.name,
            "prompt_tokens": len(self.request.prompt),
            **{field: begin.get(field) for field in ("canvas", "reuse", "selection")},
            "seconds": round(time.monotonic() - self.started, 3),
        }


class Request:
    """One that tells of its steps, while it runs."""

    def __init__(self, name: str, model: str, choices: int, watched: bool, own: Follower | None, first_choice: int):
        self.name, self.model, self.choices, self.watched = name, model, choices, watched
        self.first_choice = first_choice
        self.prompt: list[int] = []
        self.canvases = [Followed(self, index) for index in range(choices)]
        if own is not None:
            for canvas in self.canvases:
                canvas.follow(own)


class Hub:
    def __init__(self) -> None:
        self.requests: dict[str, Request] = {}  # by the name their client knows

    def __bool__(self) -> bool:
        return bool(self.requests)

    def add(self, request: Request) -> None:
        self.requests[request.name] = request

    def remove(self, request: Request) -> None:
        """It has ended, however it did."""
        if self.requests.get(request.name) is request:
            del self.requests[request.name]
        for canvas in request.canvases:
            canvas.end("abort", len(canvas.filled))

    def take(self, name: str, index: int, message: dict, text: Text) -> None:
        """A message of an engine about a choice of a request"""
        if request := self.requests.get(name):  # else whoever wanted to know is gone
            request.canvases[index].take(message, text)

    def watched(self) -> Iterator[Followed]:
        for request in self.requests.values():
            if request.watched:
                yield from request.canvases

    def find(self, name: str) -> Followed | None:
        return next((canvas for canvas in self.watched() if canvas.name == name), None)


HUB = Hub()


def told(frame: Frame, text: Text) -> Frame:
    """With the text of its tokens"""
    with_text = {
        kind: [[at, token, text(token), *rest] for at, token, *rest in frame[kind]] for kind in ("set", "edited")
    }
    guesses = [
        [position, text(token), p, [[text(other), q] for other, q in others]]
        for position, token, p, others in frame["guesses"]
    ]
    return frame | with_text | {"guesses": guesses}


@lru_cache(maxsize=4)
def texts_of(tokenizer) -> Text:
    """What single tokens of a tokenizer look like"""

    @lru_cache(maxsize=1 << 16)
    def text(token: int) -> str:
        return "" if tokenizer is None else tokenizer.decode([token])

    return text
