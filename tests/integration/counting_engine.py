"""The route for scores in an app of its own, with a real tokenizer and an engine that only counts."""

import asyncio
import json
import threading
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest
from vllm.logprobs import Logprob

from tests.integration.serving import CHECKPOINT
from vllm_dlm.configuration import server_options_of
from vllm_dlm.options.limits import Limits
from vllm_dlm.options.scored import SCORE
from vllm_dlm.scoring import route

LONGEST = 4096  # the model's length in tokens
WORD = "Copy: a b c d "


@pytest.fixture(scope="module")
def processor():
    """vLLM's front-end without an engine"""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.renderers import renderer_from_config
    from vllm.v1.engine.input_processor import InputProcessor

    config = EngineArgs(model=str(CHECKPOINT), max_model_len=LONGEST, dtype="float32").create_engine_config()
    return InputProcessor(config, renderer_from_config(config))


class CountedTokenizer:
    """A tokenizer that records the length of each text it encodes, and the thread."""

    def __init__(self, tokenizer):
        self.tokenizer, self.lengths, self.threads = tokenizer, [], set()

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def _count(self, text):
        self.lengths.append(len(text))
        self.threads.add(threading.get_ident())

    def __call__(self, text, **kwargs):
        self._count(text)
        return self.tokenizer(text, **kwargs)

    def encode(self, text, **kwargs):
        self._count(text)
        return self.tokenizer.encode(text, **kwargs)


class CountingEngine:
    """An engine client whose forwards find every token at -1, and count how many of them run at a time."""

    errored = False

    def __init__(self, processor):
        self.input_processor, self.model_config = processor, processor.model_config
        self.started = self.running = self.most = 0
        self.priorities: Counter = Counter()
        self.answer = asyncio.Event()  # forwards wait for it
        self.answer.set()
        self.finish_reason, self.logprob = "length", -1.0

    async def generate(self, prompt, params, request_id, *, priority=0):
        self.started += 1
        self.running += 1
        self.most = max(self.most, self.running)
        self.priorities[priority] += 1
        try:
            await asyncio.sleep(0)
            await self.answer.wait()
            logprobs = [{token: Logprob(self.logprob, 1)} for token in params.extra_args[SCORE]["answer"]]
            one = SimpleNamespace(logprobs=logprobs, finish_reason=self.finish_reason, stop_reason=None)
            yield SimpleNamespace(outputs=[one])
        finally:
            self.running -= 1


class Served:
    """The route in an app of its own"""

    def __init__(self, processor, monkeypatch, limits: Limits):
        from fastapi import FastAPI
        from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

        self.tokenizer = CountedTokenizer(processor.renderer.tokenizer)
        monkeypatch.setattr(processor.renderer, "tokenizer", self.tokenizer)
        model = processor.model_config
        monkeypatch.setattr(model, "dlm_options", replace(server_options_of(model), limits=limits))
        self.engine = CountingEngine(processor)
        models = SimpleNamespace(model_name=lambda: "demo", is_base_model=lambda name: name == "demo")
        self.app = FastAPI()
        self.app.include_router(route.router)
        self.app.state.args = Namespace(log_error_stack=False)
        self.app.state.dlm_scores = route.ServingScores(self.engine, models)
        init_exception_handler(self.app)

    def post(self, content: bytes | None = None, headers: dict | None = None, **fields) -> httpx.Response:
        async def post():
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                data = json.dumps(fields).encode() if content is None else content
                headers_ = {"Content-Type": "application/json"} | (headers or {})
                return await client.post(route.PATH, content=data, headers=headers_, timeout=None)

        return asyncio.run(post())

    def refused(self, field: str, named: str, **given) -> None:
        error = (response := self.post(**given)).json()["error"]
        assert response.status_code == 400 and error["param"] == field, error
        assert named in error["message"] and len(response.content) < 1000


@pytest.fixture
def serve(processor, monkeypatch):
    return lambda **limits: Served(processor, monkeypatch, Limits(**limits))


@pytest.fixture
def served(serve):
    return serve()


CONTEXT = (WORD * 1200)[:16_000]


async def raw(served, content: bytes, disconnected: asyncio.Event | None = None) -> int | None:
    """The status that the app answers with. The client disconnects when it is told to."""
    messages, status = [{"type": "http.request", "body": content, "more_body": False}], None

    async def receive():
        if messages:
            return messages.pop()
        await (disconnected or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message):
        nonlocal status
        status = message.get("status", status)

    headers = [(b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": route.PATH,
        "raw_path": route.PATH.encode(),
        "query_string": b"",
        "headers": headers,
        "root_path": "",
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
    }
    await served.app(scope, receive, send)
    return status
