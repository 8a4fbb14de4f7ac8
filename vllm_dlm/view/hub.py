"""The front-end's side of the live view: observed requests, and the connections that follow them.

An engine's messages (traces.py) come to `Hub.take`, which adds frames to the history of their canvas. Nothing else is
done with a frame until a follower reads it: it then gets its text and its JSON, once for all followers that have read
equally far. All of it runs in the thread of the server's event loop, in pieces of SLICE tokens.

Requests are known by vLLM's internal id. A client may give several requests the same X-Request-Id, at the same time
and with different numbers of choices; internal ids are unique.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import Any

import msgspec
import numpy as np
from vllm.exceptions import GracefulHTTPError

from vllm_dlm.client_cache import ClientCache
from vllm_dlm.integration.refusal import refuse
from vllm_dlm.limits import Limits
from vllm_dlm.view.frames import INTERVAL, SLICE, Frame, History, Moment, json_slices
from vllm_dlm.view.isolation import Isolated, error_message, isolated, log_fault

#: tokens; the text of a longer prompt is not sent
LONGEST_PROMPT = 8192
#: positions of canvases that are sent every INTERVAL seconds, all followers together: with more, frames are rarer
POSITIONS = 4096
#: seconds after which a follower with unread frames may be dropped in favour of another
PATIENCE = 60.0
Text = Callable[[int], str]


class TooManyOnlookers(GracefulHTTPError):
    """HTTP 503: another client's request or connection has to end first."""

    def __init__(self, message: str):
        super().__init__(message, HTTPStatus.SERVICE_UNAVAILABLE)


# -- text ----------------------------------------------------------------------------------------


@lru_cache(maxsize=4)  # engines of one process
def texts_of(tokenizer) -> Text:
    """The text of single tokens of a tokenizer"""
    known: ClientCache[int, str] = ClientCache("texts")

    def text(token: int) -> str:
        found = known.get(token)
        return known.put(token, "" if tokenizer is None else tokenizer.decode([token])) if found is None else found

    return text


async def texts(text: Text, tokens: list[int]) -> dict[int, str]:
    found = {}
    for start in range(0, len(tokens), SLICE):
        found |= {token: text(token) for token in tokens[start : start + SLICE]}
        await asyncio.sleep(0)
    return found


# -- followers -----------------------------------------------------------------------------------


@dataclass(eq=False)
class Cursor:
    """How far a follower has read a canvas. `moment` None: it has not been sent `begin`."""

    moment: Moment | None = None


class Follower:
    """A connection that reads frames of some canvases. It costs nothing until it reads."""

    def __init__(self) -> None:
        self.cursors: dict[Canvas, Cursor] = {}
        self.ready = asyncio.Event()
        self.dropped = False
        self.read_at = 0.0
        self.unread_since: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def positions(self) -> int:
        return sum(canvas.length for canvas in self.cursors)

    @property
    def stale(self) -> bool:
        return self.unread_since is not None and time.monotonic() - self.unread_since > PATIENCE

    def follow(self, canvas: "Canvas") -> None:
        """What was so far comes in one frame."""
        self.cursors[canvas] = Cursor()
        if canvas.final is None:
            canvas.followers.append(self)
        if canvas.begin is not None or canvas.final is not None:
            self.notify()

    def notify(self, at_once: bool = False) -> None:
        """Something can be read: at once, or a while after the last time."""
        if self.unread_since is None:
            self.unread_since = time.monotonic()
        if self.ready.is_set() or (self._timer is not None and not at_once):
            return
        left = self.read_at + HUB.interval() - time.monotonic()
        if at_once or left <= 0:
            self._be_ready()
        else:
            self._timer = asyncio.get_running_loop().call_later(left, self._be_ready)

    def _be_ready(self) -> None:
        self._cancel_timer()
        self.ready.set()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def take(self) -> list[tuple[int, bytes]]:
        """(choice, JSON of a message), in order"""
        self.ready.clear()
        self.unread_since = None
        HUB.followers.get(self)  # it reads: others are dropped first
        found = []
        for canvas, cursor in list(self.cursors.items()):
            while (message := await canvas.next(cursor)) is not None:
                found.append((canvas.choice, message))
            if canvas.final is not None:
                found.append((canvas.choice, canvas.final))
                self.cursors.pop(canvas, None)
        self.read_at = time.monotonic()
        return found

    def drop(self) -> None:
        """Ends what it follows: it does not read, and others wait."""
        self.dropped = True
        self.close()
        self.ready.set()

    def close(self) -> None:
        self._cancel_timer()
        for canvas in self.cursors:
            if self in canvas.followers:
                canvas.followers.remove(self)
        self.cursors.clear()
        HUB.followers.pop(self)


# -- canvases ------------------------------------------------------------------------------------


class Canvas(Isolated):
    """One choice of an observed request: its history, and who follows it."""

    def __init__(self, request: "ObservedRequest", index: int):
        self.request, self.index = request, index
        self.started = time.monotonic()
        self.begin: dict[str, Any] | None = None
        self.length = 0  # of the canvas, with its prompt
        self.followers: list[Follower] = []
        self.filled: list[int] = []  # the step of each delivered token
        self.final: bytes | None = None  # the last message: its end, or an error
        self.text: Text = str  # until the first message
        self._lock = asyncio.Lock()
        self._json: dict[tuple[int, int], tuple[bytes, Moment]] = {}  # frames by where they begin and end
        self._begin_json: bytes | None = None

    @property
    def choice(self) -> int:
        """Its number in the response"""
        return self.request.first_choice + self.index

    @property
    def subject(self) -> str:
        return f"request {self.request.name}, choice {self.choice}"

    def fail(self, error: Exception) -> None:
        self.stop(self.request.log(error))

    def stop(self, fault: str) -> None:
        """Onlookers get an error instead of further frames and of the trajectory."""
        self.fault, message = fault, error_message(fault)
        self._finish(message)
        if self.request.channel is not None and self.request.options.trajectory:
            self.request.channel.trajectories[self.choice] = message

    @isolated
    def take(self, message: bytes, tokenizer) -> None:
        """A message of the engine"""
        content = msgspec.msgpack.decode(message)
        self.text = texts_of(tokenizer)
        if "error" in content:  # which the engine logged
            self.stop(content["error"])
        elif "begin" in content:
            begin = content["begin"]
            self.length, holes = begin.pop("length"), begin.pop("holes")
            filled = np.arange(self.length) < self.prompt_len
            filled[[self.prompt_len + at for at, _ in begin["given"]]] = True
            filled[holes] = False
            self.history, self.begin = History(filled), begin
            self.first = self.history.now()
            self._notify()
        else:
            self.history.add(Frame.unpack(content["frame"]))
            self._json.clear()
            self._notify()

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt)

    def _notify(self, at_once: bool = False) -> None:
        for follower in self.followers:
            follower.notify(at_once)

    def _finish(self, message: dict) -> None:
        if self.final is None:
            self.final = msgspec.json.encode(message)
            self._notify(at_once=True)
            self.followers = []

    def end(self, reason: str | None, tokens: int) -> None:
        self._finish({
            "end": {
                "steps": self.history.last.step if self.begin and self.history.last else 0,
                "seconds": round(time.monotonic() - self.started, 3),
                "tokens": tokens,
                "finish_reason": reason,
            }
        })  # fmt: skip

    def trajectory(self, tokens: int) -> dict:
        return {"trajectory": self.filled[:tokens]} if self.fault is None else error_message(self.fault)

    # -- reading ---------------------------------------------------------------------------

    @isolated
    async def next(self, cursor: Cursor) -> bytes | None:
        """JSON of `begin`, or of one frame with all that is new to the cursor; None: it has read everything"""
        if self.begin is None:
            return None
        async with self._lock:
            if cursor.moment is None:
                if self._begin_json is None:
                    self._begin_json = await self._encode_begin()
                cursor.moment = self.first
                return self._begin_json
            if self.history.count == cursor.moment.count:
                return None
            key = cursor.moment.count, self.history.count
            if key not in self._json:
                now = self.history.now()
                self._json[key] = await self._encode(self.history.since(cursor.moment)), now
            message, cursor.moment = self._json[key]
            return message

    async def _encode_begin(self) -> bytes:
        prompt = self.request.prompt
        given = self.begin["given"]
        shown = prompt if len(prompt) <= LONGEST_PROMPT else []
        text = await texts(self.text, list({*shown, *(token for _, token in given)}))
        message = {"request": self.request.name, "model": self.request.model, "prompt_tokens": len(prompt)} | self.begin
        message["prompt"] = [[text[token]] for token in prompt] if len(prompt) <= LONGEST_PROMPT else None
        message["given"] = [[position, token, text[token]] for position, token in given]
        return msgspec.json.encode({"begin": message})

    async def _encode(self, frame: Frame) -> bytes:
        text = await texts(self.text, frame.tokens)
        parts = []
        for part in json_slices(frame, self.prompt_len, text):
            parts.append(part)
            await asyncio.sleep(0)
        return b"".join(parts)

    def listed(self) -> dict[str, Any]:
        """As /dlm/requests has it"""
        begin = self.begin or {}
        return {
            "request": self.request.name,
            "choice": self.index,
            "prompt_tokens": self.prompt_len,
            **{field: begin.get(field) for field in ("canvas", "reuse", "selection")},
            "seconds": round(time.monotonic() - self.started, 3),
        }


# -- requests ------------------------------------------------------------------------------------


class ObservedRequest(Isolated):
    """A request with dlm_frames, dlm_watch or dlm_trajectory, from its check until it has ended."""

    def __init__(self, model: str, choices: int, options, channel=None):
        self.name = ""  # vLLM's internal id, once there is one
        self.model, self.choices, self.options, self.channel = model, choices, options, channel
        self.own: Follower | None = channel.follower if channel is not None and options.frames else None
        self.first_choice = 0 if channel is None else channel.open(choices)
        self.prompt: list[int] = []
        self.canvases = [Canvas(self, index) for index in range(choices)]
        self.tokens: Counter[int] = Counter()  # delivered, by choice
        self._ending: list[tuple[Canvas, str]] = []
        self._logged: str | None = None
        if self.own is not None:
            for canvas in self.canvases:
                self.own.follow(canvas)

    @property
    def subject(self) -> str:
        return f"request {self.name}"

    def log(self, error: Exception) -> str:
        """One line for each request, whichever of its choices is concerned"""
        self._logged = self._logged or log_fault(self.subject, error)
        return self._logged

    def fail(self, error: Exception) -> None:
        self.fault = self.log(error)
        for canvas in self.canvases:
            canvas.stop(self.fault)

    @isolated
    def bind(self, name: str, prompt: list[int]) -> None:
        """vLLM gave the request its internal id."""
        self.name, self.prompt = name, prompt
        HUB.bind(self)

    @isolated
    def take(self, index: int, message: bytes, tokenizer) -> None:
        self.canvases[index].take(message, tokenizer)

    @isolated
    def fill(self, index: int, steps: list[int]) -> None:
        """`steps` that filled the next tokens of a choice"""
        self.canvases[index].filled += steps

    @isolated
    def note(self, output, deltas: bool) -> None:
        """An output on its way to the client. `deltas`: it has new tokens only"""
        for completion in output.outputs:
            canvas, count = self.canvases[completion.index], len(completion.token_ids)
            self.tokens[canvas.index] = count + self.tokens[canvas.index] * deltas
            if completion.finish_reason is None:
                continue
            self._ending.append((canvas, completion.finish_reason))
            if self.options.trajectory:
                completion.dlm = canvas.trajectory(self.tokens[canvas.index])
                if self.channel is not None:
                    self.channel.trajectories[canvas.choice] = completion.dlm

    @isolated
    def end_choices(self) -> None:
        """The client has been sent the end of these choices."""
        for canvas, reason in self._ending:
            canvas.end(reason, self.tokens[canvas.index])
        self._ending = []

    @isolated
    def end(self) -> None:
        for canvas in self.canvases:
            canvas.end("abort", len(canvas.filled))


# -- all of them ---------------------------------------------------------------------------------


class Hub:
    def __init__(self) -> None:
        self.admitted: set[ObservedRequest] = set()
        self.requests: dict[str, ObservedRequest] = {}  # of those, the ones with an id
        self.followers: ClientCache[Follower, Follower] = ClientCache("followers", lambda follower: follower.drop())

    def __bool__(self) -> bool:
        return bool(self.admitted)

    def interval(self) -> float:
        """Seconds between two frames for the same follower"""
        return INTERVAL * max(1.0, sum(follower.positions for follower in self.followers.values()) / POSITIONS)

    # -- bounds ----------------------------------------------------------------------------

    def admit(self, request: ObservedRequest, limits: Limits, running: Callable[[str], bool] = lambda name: True) -> None:
        """`running`: whether vLLM still knows a request. A client that does not read keeps its request from ending
        here."""
        if request.options.observed:
            if request.choices > limits.observed:
                refuse("n", request.choices, f"this server shows {limits.observed} choices (limits.observed)")
            if self._observed() + request.choices > limits.observed:
                self.remove([each for each in self.admitted if each.name and not running(each.name)])
            if self._observed() + request.choices > limits.observed:
                raise TooManyOnlookers(
                    f"dlm_frames, dlm_watch: {limits.observed} choices are observed, the limit of this server "
                    "(--dlm-config limits.observed); try again later or leave the option out"
                )
        if request.own is not None:
            self.admit_follower(request.own, limits)
        self.admitted.add(request)

    def _observed(self) -> int:
        return sum(each.choices for each in self.admitted if each.options.observed)

    def admit_follower(self, follower: Follower, limits: Limits) -> None:
        """When all places are taken, a follower that has not read for PATIENCE seconds makes room."""
        if follower in self.followers:
            return
        self.followers.bound = limits.followers
        if len(self.followers) >= limits.followers:
            stale = next((each for each in self.followers.values() if each.stale), None)
            if stale is None:
                raise TooManyOnlookers(
                    f"{limits.followers} connections follow requests, the limit of this server "
                    "(--dlm-config limits.followers); try again later"
                )
            self.followers.evict(stale)
        self.followers.put(follower, follower)

    # -- requests --------------------------------------------------------------------------

    def bind(self, request: ObservedRequest) -> None:
        if request.name in self.requests:  # VLLM_DISABLE_REQUEST_ID_RANDOMIZATION
            raise ValueError(f"another request with the internal id {request.name!r} is running")
        self.requests[request.name] = request

    def remove(self, requests: Iterable[ObservedRequest]) -> None:
        """They have ended, however they did."""
        for request in requests:
            self.admitted.discard(request)
            if self.requests.get(request.name) is request:
                del self.requests[request.name]
            request.end()
            if request.own is not None and not any(each.own is request.own for each in self.admitted):
                self.followers.pop(request.own)

    def watched(self) -> Iterator[Canvas]:
        for request in self.requests.values():
            if request.options.watch:
                yield from request.canvases

    def find(self, name: str, choice: int) -> Canvas | None:
        request = self.requests.get(name)
        if request is None or not request.options.watch or not 0 <= choice < request.choices:
            return None
        return request.canvases[choice]


HUB = Hub()
