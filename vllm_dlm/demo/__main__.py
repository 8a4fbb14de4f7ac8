"""Starts a server on the bundled checkpoint, sends a few questions at once, and stops the server."""

import argparse
import json
import shlex
import sys
import threading
import time

from rich.console import Console

from vllm_dlm import client
from vllm_dlm.demo.questions import Question, questions
from vllm_dlm.demo.screen import Screen
from vllm_dlm.demo.server import DEMO, MODEL, Server, ServerError, end_when_told
from vllm_dlm.shown import printable
from vllm_dlm.view.terminal import follow

CANVAS = 32
#: small canvas blocks, streamed one by one, show how the answers fill in
OPTIONS = {"dlm_block_length": 8}
PASSES: dict[str, dict] = {
    "one token per step": OPTIONS,
    "every token at least 0.9 probable (dlm_threshold)": {**OPTIONS, "dlm_threshold": 0.9},
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m vllm_dlm.demo", description=__doc__)
    after = parser.add_mutually_exclusive_group()
    after.add_argument("--keep", action="store_true", help="leave the server running after the answers")
    after.add_argument("--serve-only", action="store_true", help="only serve, ask nothing")
    parser.add_argument("--port", type=int, help="default: one that is free")
    parser.add_argument("--timeout", type=float, default=600, help="seconds the server may take to start")
    args = parser.parse_args()
    end_when_told()
    console = Console()
    try:
        with Server(*DEMO, port=args.port) as server:
            start(console, server, args.timeout)
            if not args.serve_only:
                console.print("\none canvas, one token per step", style="bold", highlight=False)
                follow(console, server.url, "Reverse: e s c i d p", CANVAS, OPTIONS, MODEL)
                for title, options in PASSES.items():
                    ask(console, server, title, options)
            if args.keep or args.serve_only:
                stay(console, server)
    except (ServerError, client.RequestError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def start(console: Console, server: Server, timeout: float) -> None:
    console.print(shlex.join(server.command), style="dim", markup=False, highlight=False, soft_wrap=True)
    begin = time.monotonic()
    with console.status("starting the server"):
        server.wait(timeout)
        for _ in client.stream(server.url, client.body(MODEL, "Copy: a b c", CANVAS, OPTIONS)):
            pass  # warm up, so that one-time work does not count
    console.print(f"The server was ready after {time.monotonic() - begin:.0f} s.", highlight=False)


def ask(console: Console, server: Server, title: str, options: dict) -> None:
    """Sends all questions at once; the engine denoises them in one batch."""
    asked = questions()
    screen = Screen(console, asked, CANVAS)
    console.print(f"\n{title}", style="bold", highlight=False)
    begin = time.monotonic()
    try:
        with screen.live():
            in_parallel(lambda index: answer(server, screen, index, asked[index], options), len(asked))
    except client.RequestError:
        server.check()  # if the server has died, its log explains the error better
        raise
    seconds = time.monotonic() - begin
    tokens = sum(progress.tokens for progress in screen.progress)
    console.print(f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} tokens/s", highlight=False)


def answer(server: Server, screen: Screen, index: int, question: Question, options: dict) -> None:
    request = client.body(MODEL, question.prompt, CANVAS, options)
    for progress in client.stream(server.url, request):
        screen.progress[index] = progress
    if not progress.text.strip():
        raise client.RequestError(f"{question.title}: the answer is empty")
    screen.finished(index)


def in_parallel(function, count: int) -> None:
    """Calls function(0) … function(count - 1) in parallel threads. Ctrl-C does not wait for them."""
    errors = []

    def call(index: int) -> None:
        try:
            function(index)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def stay(console: Console, server: Server) -> None:
    request = client.body(MODEL, "Copy: a b c", CANVAS, OPTIONS)
    console.print(
        f"\nServing at {server.url} until Ctrl-C. Watch canvases fill at {server.url}/dlm, or try\n\n"
        f"curl {server.url}/v1/chat/completions -H 'Content-Type: application/json' "
        f"-d {shlex.quote(json.dumps(request))}\n",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    while True:
        server.check()
        time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
