"""Observed requests in the front-end: collects reports of their engine and encodes messages for followers.

An engine's messages (traces.py) are added to the history of their canvas. A frame gets its text and JSON only when a
follower reads it, once for all followers that have read equally far. This runs in the thread of the server's event
loop, in pieces of SLICE tokens.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from vllm_dlm.client_cache import ClientCache
from vllm_dlm.view.frames import SLICE, Frame, History, Moment, json_slices
from vllm_dlm.view.isolation import Isolated, error_message, isolated, log_fault

if TYPE_CHECKING:
    from vllm_dlm.view.hub import Follower, Hub

#: maximum number of tokens of a prompt whose text is sent
LONGEST_PROMPT = 8192
Text = Callable[[int], str]


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
    found: dict[int, str] = {}
    for start in range(0, len(tokens), SLICE):
        found |= {token: text(token) for token in tokens[start : start + SLICE]}
        await asyncio.sleep(0)
    return found


# -- canvases ------------------------------------------------------------------------------------


@dataclass(eq=False)
class Cursor:
    """Position of a follower in the history of a canvas. `moment` None: `begin` was not sent yet."""

    moment: Moment | None = None


class Canvas(Isolated):
    """One choice of an observed request: its history and its followers."""

    def __init__(self, request: "ObservedRequest", index: int):
        self.request, self.index = request, index
        self.started = time.monotonic()
        self.begin: dict[str, Any] | None = None
        self.length = 0  # positions of the canvas, including its prompt
        self.followers: list[Follower] = []
        self.filled: list[int] = []  # the step of each delivered token
        self.final: bytes | None = None  # the last message: its end, or an error
        self.text: Text = str  # until the first message
        self._lock = asyncio.Lock()
        self._json: dict[tuple[int, int], tuple[bytes, Moment]] = {}  # encoded frames by first and last moment
        self._begin_json: bytes | None = None

    @property
    def choice(self) -> int:
        """Index in the response"""
        return self.request.first_choice + self.index

    @property
    def subject(self) -> str:
        return f"request {self.request.name}, choice {self.choice}"

    def fail(self, error: Exception) -> None:
        self.stop(self.request.log(error))

    def stop(self, fault: str) -> None:
        """Sends an error instead of further frames and the trajectory."""
        self.fault, message = fault, error_message(fault)
        self._finish(message)
        if self.request.channel is not None and self.request.options.trajectory:
            self.request.channel.trajectories[self.choice] = message

    @isolated
    def take(self, message: bytes, tokenizer) -> None:
        """Takes a message of the engine."""
        content = msgspec.msgpack.decode(message)
        self.text = texts_of(tokenizer)
        if "error" in content:  # already logged by the engine
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
        self._finish(
            {
                "end": {
                    "steps": self.history.last.step if self.begin and self.history.last else 0,
                    "seconds": round(time.monotonic() - self.started, 3),
                    "tokens": tokens,
                    "finish_reason": reason,
                }
            }
        )

    def trajectory(self, tokens: int) -> dict:
        return {"trajectory": self.filled[:tokens]} if self.fault is None else error_message(self.fault)

    # -- reading ---------------------------------------------------------------------------

    @isolated
    async def next(self, cursor: Cursor) -> bytes | None:
        """JSON of `begin`, or of one frame with all changes after the cursor; None: nothing new"""
        if self.begin is None:
            return None
        async with self._lock:
            if cursor.moment is None:
                if self._begin_json is None:
                    self._begin_json = await self._encode_begin(self.begin)
                cursor.moment = self.first
                return self._begin_json
            if self.history.count == cursor.moment.number:
                return None
            key = cursor.moment.number, self.history.count
            if key not in self._json:
                now = self.history.now()
                self._json[key] = await self._encode(self.history.since(cursor.moment)), now
            message, cursor.moment = self._json[key]
            return message

    async def _encode_begin(self, begin: dict[str, Any]) -> bytes:
        prompt, given = self.request.prompt, begin["given"]
        shown = prompt if len(prompt) <= LONGEST_PROMPT else []
        text = await texts(self.text, list({*shown, *(token for _, token in given)}))
        named = {"request": self.request.name, "model": self.request.model, "prompt_tokens": len(prompt)}
        message: dict[str, Any] = named | begin
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
        """Entry of /dlm/requests"""
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
    """A request with dlm_frames, dlm_watch or dlm_trajectory, from its check to its end."""

    def __init__(self, name: str, model: str, choices: int, options, channel=None):
        self.name = name  # the client's id, until vLLM assigns the internal id
        self.model, self.choices, self.options, self.channel = model, choices, options, channel
        self.own: Follower | None = channel.follower if channel is not None and options.frames else None
        self.first_choice = 0 if channel is None else channel.open(choices)
        self.prompt: list[int] = []
        self.hub: Hub  # set on admission
        self.canvases = [Canvas(self, index) for index in range(choices)]
        self.tokens: Counter[int] = Counter()  # number of delivered tokens by choice
        self._ending: list[tuple[Canvas, str]] = []
        self._logged: str | None = None
        if self.own is not None:
            for canvas in self.canvases:
                self.own.follow(canvas)

    @property
    def subject(self) -> str:
        return f"request {self.name}"

    def log(self, error: Exception) -> str:
        """Logs an error once per request, for all of its choices."""
        self._logged = self._logged or log_fault(self.subject, error)
        return self._logged

    def fail(self, error: Exception) -> None:
        self.fault = self.log(error)
        for canvas in self.canvases:
            canvas.stop(self.fault)

    @isolated
    def bind(self, name: str, prompt: list[int]) -> None:
        """Called when vLLM has assigned the internal id."""
        self.name, self.prompt = name, prompt
        self.hub.bind(self)

    @isolated
    def take(self, index: int, message: bytes, tokenizer) -> None:
        self.canvases[index].take(message, tokenizer)

    @isolated
    def fill(self, index: int, steps: list[int], fault: str | None = None) -> None:
        """`steps`: steps that filled the next tokens of a choice; `fault`: why they are not available"""
        if fault is None:
            self.canvases[index].filled += steps
        else:
            self.canvases[index].stop(fault)

    @isolated
    def note(self, output, deltas: bool) -> None:
        """Takes an output before it is sent to the client. `deltas`: it only has new tokens"""
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
        """Called after the client has received the end of choices."""
        for canvas, reason in self._ending:
            canvas.end(reason, self.tokens[canvas.index])
        self._ending = []

    @isolated
    def end(self) -> None:
        for canvas in self.canvases:
            canvas.end("abort", len(canvas.filled))
