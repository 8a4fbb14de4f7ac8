"""A stream of a chat or completion with frames between its chunks, and a response with its trajectories."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

from vllm_dlm.view.hub import Follower

DATA, DONE = "data: ", "data: [DONE]"


class Channel:
    """Of one HTTP request: what its engine requests have to tell its client."""

    def __init__(self, stream: bool, kind: str, empty: dict, model: str):
        """`kind` of object a chunk is, and `empty`: the choice of one that says nothing"""
        self.stream, self.kind, self.empty, self.model = stream, kind, empty, model
        self.created = int(time.time())
        self.name: str | None = None
        self.choices = 0
        self.follower = Follower()
        self.trajectories: dict[int, list[int]] = {}  # of choices that have ended

    def opened(self, choices: int) -> int:
        """An engine request of so many choices -> the number of its first"""
        first, self.choices = self.choices, self.choices + choices
        return first

    def chunk(self, choice: int, message: dict) -> str:
        said = {"index": choice, **self.empty, "logprobs": None, "finish_reason": None}
        head = {"id": self.name, "object": self.kind, "created": self.created, "model": self.model}
        return f"{DATA}{json.dumps(head | {'choices': [said], 'dlm': self.own(choice, message)})}\n\n"

    def own(self, choice: int, message: dict) -> dict:
        return message if self.choices == 1 else {"choice": choice} | message

    def news(self) -> list[str]:
        return [self.chunk(choice, message) for choice, message in self.follower.take()]


#: of the HTTP request that is being answered
CHANNEL: ContextVar[Channel | None] = ContextVar("CHANNEL", default=None)


async def with_frames(theirs: AsyncIterator[str], channel: Channel) -> AsyncGenerator[str, None]:
    """Their lines, and frames as they come. What ends a stream comes last."""
    ready = channel.follower.ready
    line = asyncio.ensure_future(anext(theirs))
    news = asyncio.ensure_future(ready.wait())
    try:
        while True:
            await asyncio.wait({line, news}, return_when=asyncio.FIRST_COMPLETED)
            if ready.is_set():
                for chunk in channel.news():
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
                for chunk in channel.news():
                    yield chunk
            yield with_trajectory(text, channel) if channel.trajectories else text
            line = asyncio.ensure_future(anext(theirs))
    finally:
        for task in (line, news):
            task.cancel()
            with suppress(BaseException):
                await task
        await theirs.aclose()  # type: ignore[attr-defined]


def with_trajectory(line: str, channel: Channel) -> str:
    """The last chunk of a choice says which step filled its tokens."""
    if line.startswith(DONE) or not line.startswith(DATA):
        return line
    chunk: dict[str, Any] = json.loads(line.removeprefix(DATA))
    for choice in chunk.get("choices", []):
        if choice.get("finish_reason") and (found := channel.trajectories.get(choice["index"])) is not None:
            chunk["dlm"] = channel.own(choice["index"], {"trajectory": found})
            return f"{DATA}{json.dumps(chunk)}\n\n"
    return line


def with_trajectories(response: Any, channel: Channel) -> Any:
    """A response that is complete. An error has none."""
    if channel.trajectories and hasattr(response, "choices"):
        found = [channel.own(choice, {"trajectory": steps}) for choice, steps in sorted(channel.trajectories.items())]
        response.dlm = found[0] if channel.choices == 1 else found
    return response
