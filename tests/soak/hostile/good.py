"""Clients that ask what they know the answer of, all the time, while a server is attacked."""

import threading
import time
from collections.abc import Iterator

from tests.soak import served
from tests.soak.clients import Asked, Client
from vllm_dlm.demo import server as demo
from vllm_dlm.demo.questions import questions
from vllm_dlm.methods import methods

GOOD = 3  # clients at a time


def known_requests() -> Iterator[Asked]:
    """The demo's questions, long canvases under every reuse policy, every decoding, and seeded samples"""
    for question in questions():
        yield Asked("/v1/chat/completions", served.chat(question.prompt))
    for name in methods("reuse"):
        for question in questions()[1:]:
            more = {"max_tokens": 256, "ignore_eos": True, "vllm_xargs": {"dlm_reuse": name, "dlm_steps": 32}}
            yield Asked("/v1/chat/completions", served.chat(question.prompt) | more)
    for number, name in enumerate(sorted(methods("decoding"))):
        extra = {"dlm_decoding": name, "dlm_threshold": "none"}
        if name == "token_editing":
            extra["dlm_threshold"] = 0.7
        # Some decodings draw positions in greedy requests, too.
        for more in ({"temperature": 0, "seed": number}, {"temperature": 0.8, "seed": number, "n": 2}):
            body = {"model": demo.MODEL, "prompt": f"Copy: a b {number}", "max_tokens": 24, "return_token_ids": True}
            yield Asked("/v1/completions", body | more | {"vllm_xargs": extra | {"dlm_block_length": 8}})


class GoodClients:
    """Ask for what they know, all the time; runs inside of `with`."""

    def __init__(self, client: Client, known: list[Asked]):
        self.client, self.known = client, known
        self.ends: list[float] = []
        self.changed: list[str] = []
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self._work, args=(number,)) for number in range(GOOD)]

    def _work(self, number: int) -> None:
        at = number * len(self.known) // GOOD
        while not self.stop.is_set():
            asked = self.known[at % len(self.known)]
            at += 1
            try:
                status, answer = self.client.ask(asked)
            except OSError as error:
                status, answer = None, [repr(error)]
            if self.stop.is_set():
                return
            if status != 200 or answer != asked.answer:
                self.changed.append(f"{asked.body} answered {status} {answer}, before {asked.answer}"[:2000])
                time.sleep(0.2)
            self.ends.append(time.monotonic())

    def __enter__(self) -> "GoodClients":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def between(self, begin: float, end: float) -> int:
        return sum(begin <= at <= end for at in self.ends)
