"""A streaming chat request with the standard library: server-sent events over http.client."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

#: urlopen without the proxies of the environment: the server is on this machine
urlopen = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


@dataclass
class Progress:
    """A request so far."""

    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None


class RequestError(Exception):
    """The server refused the request or broke off; the message is the server's."""


def body(model: str, prompt: str, max_tokens: int, options: dict) -> dict:
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "vllm_xargs": options,
    }


def stream(url: str, request: dict, timeout: float = 300) -> Iterator[Progress]:
    """The growing answer, once per committed block."""
    request = {**request, "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    post = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(request).encode(), {"Content-Type": "application/json"}
    )
    progress = Progress()
    try:
        with urlopen(post, timeout=timeout) as response:
            for event in events(response):
                add(progress, event)
                yield progress
    except urllib.error.HTTPError as error:
        raise RequestError(f"HTTP {error.code}: {message(error.read())}") from None
    except OSError as error:
        raise RequestError(f"the server broke off: {error}") from None
    if progress.finish_reason is None:
        raise RequestError("the answer ended without a finish reason")


def events(response) -> Iterator[dict]:
    for line in response:
        if not line.startswith(b"data: "):
            continue
        data = line[len(b"data: ") :].strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise RequestError(message(data))
        yield event


def add(progress: Progress, event: dict) -> None:
    if usage := event.get("usage"):
        progress.tokens = usage["completion_tokens"]
    for choice in event["choices"]:
        progress.text += choice["delta"].get("content") or ""
        progress.finish_reason = choice["finish_reason"] or progress.finish_reason


def message(data: bytes) -> str:
    try:
        return json.loads(data)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return data.decode(errors="replace")
