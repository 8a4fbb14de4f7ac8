"""Streams chat completions with the `openai` client."""

from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import openai
from openai.types.chat import ChatCompletionChunk


@dataclass
class Progress:
    """Progress of a request."""

    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None


class RequestError(Exception):
    """The server rejected the request or closed the connection. The message is the server's."""


def connect(url: str, timeout: float = 300) -> openai.OpenAI:
    """Client that ignores the environment's proxies, because the server is on this machine."""
    direct = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=timeout, max_retries=0, http_client=direct)


def body(model: str, prompt: str, max_tokens: int, options: dict) -> dict:
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "vllm_xargs": options,
    }


def stream(url: str, request: dict) -> Iterator[Progress]:
    """Yields the growing answer to `request` (see `body`), once per committed canvas block."""
    rest = {field: value for field, value in request.items() if field not in ("model", "messages")}
    rest["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    progress = Progress()
    try:
        with connect(url) as client:
            for chunk in client.chat.completions.create(
                model=request["model"], messages=request["messages"], stream=True, extra_body=rest
            ):
                add(progress, chunk)
                yield progress
    except openai.APIStatusError as error:
        raise RequestError(f"HTTP {error.status_code}: {message(error)}") from None
    except (openai.APIConnectionError, httpx.TransportError) as error:
        raise RequestError(f"connection lost: {error}") from None
    except openai.APIError as error:  # an error event within the stream
        raise RequestError(message(error)) from None
    if progress.finish_reason is None:
        raise RequestError("the answer ended without a finish reason")


def add(progress: Progress, chunk: ChatCompletionChunk) -> None:
    if chunk.usage:
        progress.tokens = chunk.usage.completion_tokens
    for choice in chunk.choices:
        progress.text += choice.delta.content or ""
        progress.finish_reason = choice.finish_reason or progress.finish_reason


def message(error: openai.APIError) -> str:
    """The server's error message, without the text that the client adds."""
    said = error.body.get("message") if isinstance(error.body, dict) else None
    return said if isinstance(said, str) else error.message
