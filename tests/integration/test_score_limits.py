"""What a request for scores may cost: counted through the app, with a real tokenizer and an engine that only counts."""

import asyncio
import json
import random
import threading
import weakref
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
from vllm_dlm.scoring import body, route, scores

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


# -- what is refused before it costs anything ------------------------------------------------


CONTEXT = (WORD * 1200)[:16_000]


@pytest.mark.parametrize(
    "field, limit, fields",
    [
        ("continuation", "score_pairs", {"context": CONTEXT, "continuation": [" a"] * 10_000}),
        ("context", "score_pairs", {"context": [[5]] * 1025, "continuation": [6]}),
        ("context and continuation", "score_characters", {"context": CONTEXT, "continuation": [" a"] * 100}),
        ("context and continuation", "score_characters", {"context": [5] * (1 << 20), "continuation": [6]}),
        ("mc_num", "score_draws", {"context": CONTEXT, "continuation": " a", "mc_num": 1 << 15}),
        ("mc_num", "score_draws", {"context": [5], "continuation": [[6]] * 129}),
        ("body", "score_pairs", {"context": [[5]] * 100_000, "continuation": [6]}),
        ("body", "score_pairs", {f"field {index}": index for index in range(20_000)}),
        ("body", "score_pairs", {"context": {"a": [{}] * 20_000}, "continuation": [6]}),
        ("body", "score_characters", {"context": [5] * (1 << 22), "continuation": [6]}),
        ("body", "score_characters", {"context": "a" * (17 << 20), "continuation": [6]}),
    ],
)
def test_what_exceeds_a_limit_is_not_encoded(served, field, limit, fields):
    served.refused(field, f"--dlm-config limits.{limit}", **fields)
    assert not served.tokenizer.lengths and not served.engine.started


def test_a_body_that_exceeds_the_limits_far_is_not_parsed(served, monkeypatch):
    monkeypatch.setattr(body, "from_json", lambda _: pytest.fail("parsed"))
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("parsed"))
    for content in (
        b'{"context":[' + b"[5]," * 2_500_000 + b'[5]],"continuation":[6]}',
        b'{"context":[' + b"5," * 5_000_000 + b'5],"continuation":[6]}',
        b'{"context":[' + b'"",' * 3_333_333 + b'""]}',
        b"{" + b",".join(b'"k%07d":0' % index for index in range(700_000)) + b"}",
        b'{"context":' + b"[" * 10_000_000,
        b'{"context":[' + b"{}," * 3_333_333 + b"{}]}",
    ):
        response = asyncio.run(raw(served, content))
        assert response == 400


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


def test_brackets_and_commas_of_texts_do_not_count():
    rng = random.Random(0)
    for _ in range(2000):
        texts = ["".join(rng.choices('\\"[]{},aé\n', k=rng.randrange(8))) for _ in range(rng.randint(1, 4))]
        for ascii_only in (True, False):
            content = json.dumps({"context": texts, "continuation": [[5, 6]]}, ensure_ascii=ascii_only).encode()
            wanted = {"lists and objects": 4, "texts": len(texts) + 2, "values": len(texts) + 1}
            for slice_bytes in (1, 2, 3, 7, 1 << 18):
                *_, found = body.structure(content, slice_bytes)
                assert found == wanted, content


def test_a_text_that_cannot_fit_is_not_encoded(serve):
    """vLLM's own bound on the characters of a prompt"""
    served = serve(score_characters=1 << 30)
    most = LONGEST * served.tokenizer.max_chars_per_token
    served.refused("context", f"{most + 1} characters", context="a" * (most + 1), continuation=[5])
    assert not served.tokenizer.lengths
    served.refused("context", f"{LONGEST} tokens", context=" a" * (LONGEST + 1), continuation=[5])
    assert len(served.tokenizer.lengths) == 1


@pytest.mark.parametrize(
    "field, fields",
    [
        ("context", {"context": [5, "a"], "continuation": [6]}),
        ("context", {"context": [[5, True]], "continuation": [6]}),
        ("context", {"context": [[5], [[5]]], "continuation": [6]}),
        ("continuation", {"context": [5], "continuation": [6, 1.5]}),
        ("continuation", {"context": [5], "continuation": [1 << 70]}),
        ("continuation", {"context": [5], "continuation": [5] * 20 + [-1]}),
        ("context and continuation", {"context": [5] * LONGEST, "continuation": [6]}),
        ("body.priority", {"context": [5], "continuation": [6], "priority": 1 << 63}),
        ("body.priority", {"context": [5], "continuation": [6], "priority": "high"}),
        ("body.continuation", {"context": [5]}),
        ("other", {"context": [5], "continuation": [6], "other": [[[5] * 1000] * 100]}),
    ],
)
def test_bad_input_is_named(served, field, fields):
    served.refused(field, field.removeprefix("body."), **fields)
    assert not served.engine.started


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"5", b'{"context": ', b"\xff", b"[" * 1000, b'{"context": "\\ud800"}']
)
def test_what_is_no_object_is_refused(served, content):
    served.refused("body", "it must be a JSON object", content=content)


# -- what is computed ------------------------------------------------------------------------


def test_a_shared_context_is_encoded_once_more_than_its_continuations(served, processor):
    others = [f" {letter}" for letter in "abcdefgh"]
    response = served.post(context=CONTEXT[:1000], continuation=others, method="blocks").json()
    assert sorted(served.tokenizer.lengths) == [1000] + [1002] * len(others)
    encode = processor.get_tokenizer().tokenizer.encode
    before = len(encode(CONTEXT[:1000]))
    assert [each["token_ids"] for each in response["data"]] == [
        encode(CONTEXT[:1000] + text)[before:] for text in others
    ]
    assert response["usage"]["prompt_tokens"] == 8 * before + sum(len(each["token_ids"]) for each in response["data"])

    served.tokenizer.lengths.clear()
    ids = [each["token_ids"] for each in response["data"]]
    by_ids = served.post(context=encode(CONTEXT[:1000]), continuation=ids, method="blocks").json()
    assert by_ids["data"] == response["data"] and not served.tokenizer.lengths
    served.post(context=CONTEXT[:1000], continuation=ids, method="blocks")
    assert served.tokenizer.lengths == [1000]


def test_the_event_loop_neither_encodes_nor_draws_nor_writes(served, monkeypatch):
    threads = {}

    def recorded(owner, name):
        inner = getattr(owner, name)

        def record(*args):
            threads.setdefault(name, set()).add(threading.get_ident())
            result = inner(*args)
            return iter_recorded(name, result) if name == "draws" else result

        monkeypatch.setattr(owner, name, record)

    def iter_recorded(name, items):
        for item in items:
            threads[name].add(threading.get_ident())
            yield item

    for owner, name in (
        (scores, "draws"),
        (body, "from_json"),
        (body, "check_structure"),
        (route, "response_body"),
        (route.PairInputs, "pairs"),
        (scores.Forward, "params"),
    ):
        recorded(owner, name)
    assert served.post(context=WORD, continuation=[" a b", " c"], mc_num=64).status_code == 200
    assert len(set.union(*threads.values())) == 1, threads  # which the event loop waits for, and none besides
    threads["encode"] = served.tokenizer.threads
    assert len(threads) == 7 and all(own and threading.get_ident() not in own for own in threads.values()), threads


def test_draws_are_made_as_they_are_needed(served, monkeypatch):
    """16,384 draws of a long continuation: no more of them exist at a time than the engine has and a slice."""
    alive = most = made = 0
    lock = threading.RLock()

    class Counted(scores.Forward):
        def __init__(self, *args):
            super().__init__(*args)
            weakref.finalize(self, count, -1)
            count(1)

    def count(more):
        nonlocal alive, most, made
        with lock:
            alive, made = alive + more, made + max(more, 0)
            most = max(most, alive)

    monkeypatch.setattr(scores, "Forward", Counted)
    response = served.post(context=[5], continuation=list(range(100, 140)), mc_num=1 << 14, seed=0)
    (score,) = response.json()["data"]
    assert score["logprob"] == pytest.approx(-40) and score["is_greedy"] and score["token_logprobs"] is None
    assert served.engine.started == made > 1 << 13 and not served.engine.running
    assert served.engine.most <= route.AT_ONCE and most <= route.AT_ONCE + 2 * route.SLICE


def test_long_continuations_run_fewer_at_a_time(served):
    """vLLM would make the log-probabilities of all of them at once."""
    most = route.TOKENS_AT_ONCE // 4000
    content = json.dumps({"context": [5], "continuation": list(range(100, 300)) * 20, "mc_num": 64, "seed": 0}).encode()

    async def answer_late():
        served.engine.answer = asyncio.Event()
        request = asyncio.create_task(raw(served, content))
        while served.engine.running < most:
            await asyncio.sleep(0)
        await asyncio.sleep(0.5)  # in which more of them would start
        served.engine.answer.set()
        assert await request == 200

    asyncio.run(asyncio.wait_for(answer_late(), 120))
    assert served.engine.started > 60 and served.engine.most == most


def test_equal_draws_are_computed_once(served):
    (score,) = served.post(context=[5], continuation=[6], mc_num=1 << 14).json()["data"]
    assert served.engine.started == 1 and score["logprob"] == -1


def test_minus_infinity_can_be_written(served):
    served.engine.logprob = float("-inf")
    (score,) = served.post(context=[5], continuation=[6, 7], method="blocks").json()["data"]
    assert score["token_logprobs"] == [-9999, -9999] and score["logprob"] == -19998


def test_a_large_answer_is_written_as_it_was(served):
    answer = [[100 + index] * 2000 for index in range(8)]
    response = served.post(context=[5], continuation=answer, method="blocks", model="demo", request_id="7").json()
    assert set(response) == {"id", "object", "created", "model", "data", "usage"} and response["id"] == "score-7"
    for index, each in enumerate(response["data"]):
        wanted = {"index": index, "object": "dlm.score", "token_ids": answer[index], "token_logprobs": [-1.0] * 2000}
        wanted |= {"logprob": -2000.0, "num_tokens": 2000, "is_greedy": True, "method": "blocks", "seed": None}
        assert each == wanted


def test_a_client_that_disconnects_ends_its_forwards(served):
    content = json.dumps({"context": [5], "continuation": list(range(100, 140)), "mc_num": 1 << 14}).encode()

    async def disconnect():
        served.engine.answer, gone = asyncio.Event(), asyncio.Event()
        request = asyncio.create_task(raw(served, content, gone))
        while served.engine.running < route.AT_ONCE:
            await asyncio.sleep(0)
        gone.set()
        await request
        while served.engine.running:
            await asyncio.sleep(0)
        served.engine.answer.set()
        await asyncio.sleep(0.1)
        assert served.engine.started == route.AT_ONCE

    asyncio.run(asyncio.wait_for(disconnect(), 120))  # so that it ends at all


def test_a_forward_that_fails_ends_the_others(served):
    served.engine.finish_reason = "error"
    response = served.post(context=[5], continuation=list(range(100, 140)), mc_num=1 << 14)
    assert response.status_code == 500 and "ended with 'error'" in response.json()["error"]["message"]
    assert not served.engine.running and served.engine.started <= 2 * route.AT_ONCE


def test_priority_reaches_the_engine_as_from_completions(served):
    fields = {"context": [5], "continuation": [[6], [7]], "method": "blocks"}
    for wanted, extra in (
        (0, {}),
        (3, {"priority": 3}),
        (-2, {"priority": -2}),
        (9, {"priority": 3, "headers": {"X-Vllm-Priority": "9"}}),
        (3, {"priority": 3, "headers": {"X-Vllm-Priority": "soon"}}),
    ):
        served.engine.priorities.clear()
        assert served.post(**fields, **extra).status_code == 200
        assert served.engine.priorities == {wanted: 2}
