"""Adds frames between the chunks of a streamed chat or completion, and trajectories to a response."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import msgspec

from vllm_dlm.view.hub import Follower
from vllm_dlm.view.isolation import Isolated, error_message, isolated

DATA, DONE = "data: ", "data: [DONE]"
DROPPED = "its client did not read for a long time while others were waiting"


class Channel(Isolated):
    """Frames and trajectories of all engine requests of one HTTP request."""

    def __init__(self, stream: bool, kind: str, empty: dict, model: str):
        """`kind`: the chunks' "object" field; `empty`: fields of a choice without content"""
        self.stream, self.kind, self.empty, self.model = stream, kind, empty, model
        self.created = int(time.time())
        self.name: str | None = None
        self.choices = 0
        self.follower = Follower()
        self.trajectories: dict[int, dict] = {}  # choices that have ended -> {"trajectory": …} or {"error": …}
        self._error_sent = False

    @property
    def subject(self) -> str:
        return f"response {self.name}"

    def fail(self, error: Exception) -> None:
        super().fail(error)
        self.follower.close()
        self.follower.ready.set()

    def open(self, choices: int) -> int:
        """Adds an engine request with this number of choices -> index of its first choice"""
        first, self.choices = self.choices, self.choices + choices
        return first

    def chunk(self, choice: int, message: bytes) -> str:
        said = {"index": choice, **self.empty, "logprobs": None, "finish_reason": None}
        head = {"id": self.name, "object": self.kind, "created": self.created, "model": self.model, "choices": [said]}
        own = message if self.choices <= 1 else b'{"choice":%d,' % choice + message[1:]
        return f'{DATA}{json.dumps(head)[:-1]}, "dlm": {own.decode()}}}\n\n'

    async def news(self) -> list[str]:
        """Chunks with all new messages"""
        found = await self._news() or []
        fault = DROPPED if self.follower.dropped else self.fault
        if fault is not None and not self._error_sent:
            self._error_sent = True
            with suppress(Exception):  # creating chunks may be what failed
                found.append(self.chunk(0, msgspec.json.encode(error_message(fault))))
        return found

    @isolated
    async def _news(self) -> list[str]:
        return [self.chunk(choice, message) for choice, message in await self.follower.take()]

    def own(self, choice: int, message: dict) -> dict:
        return message if self.choices == 1 else {"choice": choice} | message

    @isolated
    def with_trajectory(self, line: str) -> str:
        """Adds the trajectory of a choice to its last chunk."""
        if line.startswith(DONE) or not line.startswith(DATA):
            return line
        chunk: dict[str, Any] = json.loads(line.removeprefix(DATA))
        for choice in chunk.get("choices", []):
            if choice.get("finish_reason") and (found := self.trajectories.get(choice["index"])) is not None:
                chunk["dlm"] = self.own(choice["index"], found)
                return f"{DATA}{json.dumps(chunk)}\n\n"
        return line

    def with_trajectories(self, response: Any) -> Any:
        """Adds trajectories to a complete response. Error responses have none."""
        if hasattr(response, "choices"):
            found = self._found_trajectories()
            if self.fault is not None:
                found = error_message(self.fault)
            if found:
                response.dlm = found
        return response

    @isolated
    def _found_trajectories(self) -> dict | list[dict]:
        found = [self.own(choice, message) for choice, message in sorted(self.trajectories.items())]
        return found[0] if self.choices == 1 and found else found


#: channel of the current HTTP request
CHANNEL: ContextVar[Channel | None] = ContextVar("CHANNEL", default=None)


async def with_frames(theirs: AsyncIterator[str], channel: Channel) -> AsyncGenerator[str, None]:
    """Yields vLLM's lines, and frames as they arrive. The end of the stream comes last."""
    ready = channel.follower.ready
    line = asyncio.ensure_future(anext(theirs))
    news = asyncio.ensure_future(ready.wait())
    try:
        while True:
            await asyncio.wait({line, news}, return_when=asyncio.FIRST_COMPLETED)
            if ready.is_set():
                for chunk in await channel.news():
                    yield chunk
            if news.done():
                news = asyncio.ensure_future(ready.wait())
            if not line.done():
                continue
            try:
                text = line.result()
            except StopAsyncIteration:
                return
            if text.startswith(DONE):
                for chunk in await channel.news():
                    yield chunk
            yield (channel.with_trajectory(text) or text) if channel.trajectories else text
            line = asyncio.ensure_future(anext(theirs))
    finally:
        channel.follower.close()
        for task in (line, news):
            task.cancel()
            with suppress(BaseException):
                await task
        await theirs.aclose()  # type: ignore[attr-defined]
