"""Sends a prompt to a server and shows how the canvas of its answer is filled."""

import argparse
import os
import sys
from collections.abc import Sequence

import httpx
import openai
from rich.console import Console

from vllm_dlm.client import RequestError, connect, message
from vllm_dlm.shown import printable
from vllm_dlm.view.screen import Screen


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vllm_dlm watch", description=__doc__)
    parser.add_argument("url", help="URL of a server, for example http://127.0.0.1:8000")
    parser.add_argument("prompt")
    parser.add_argument("--model", help="default: the server's first model")
    parser.add_argument("--max-tokens", type=int, default=64, help="length of the canvas")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=option,
        metavar="dlm_OPTION=VALUE",
        help="option of the request, repeatable",
    )
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY", "none"))
    args = parser.parse_args(arguments)
    try:
        follow(
            Console(highlight=False),
            args.url.rstrip("/"),
            args.prompt,
            args.max_tokens,
            dict(args.set),
            args.model,
            args.temperature,
            args.api_key,
        )
    except RequestError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def option(text: str) -> tuple[str, str | float]:
    name, given, value = text.partition("=")
    if not given or not name.startswith("dlm_"):
        raise argparse.ArgumentTypeError(f"{text!r} is not dlm_OPTION=VALUE")
    try:
        return name, float(value)
    except ValueError:
        return name, value


def follow(
    console: Console,
    url: str,
    prompt: str,
    max_tokens: int,
    options: dict,
    model: str | None = None,
    temperature: float = 0.0,
    key: str = "none",
) -> Screen:
    """Sends a chat and shows its canvas -> the final screen"""
    screen, text = Screen(console), ""
    try:
        with connect(url).with_options(api_key=key) as client, screen.live():
            stream = client.chat.completions.create(
                model=model or client.models.list().data[0].id,
                messages=[{"role": "user", "content": prompt}],
                max_tokens=max_tokens,
                temperature=temperature,
                stream=True,
                extra_body={"vllm_xargs": options | {"dlm_frames": 1}},
            )
            for chunk in stream:
                for choice in chunk.choices:
                    text += choice.delta.content or ""
                if told := (chunk.model_extra or {}).get("dlm"):
                    screen.take(told)
    except openai.APIStatusError as error:
        raise RequestError(f"HTTP {error.status_code}: {message(error)}") from None
    except (openai.APIConnectionError, httpx.TransportError) as error:
        raise RequestError(f"connection lost: {error}") from None
    except openai.APIError as error:
        raise RequestError(message(error)) from None
    if screen.end is None and screen.fault is None:
        raise RequestError("the server sent no frames; it requires vllm_dlm and a diffusion model")
    console.print(printable(text.strip()), markup=False, highlight=False, emoji=False, soft_wrap=True)
    if screen.fault is not None:
        raise RequestError(screen.fault)
    return screen
