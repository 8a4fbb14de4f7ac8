"""What a request for scores costs, once it is accepted."""

import asyncio
import json
import threading
import weakref

import pytest

from tests.integration.counting_engine import CONTEXT, WORD, processor, raw, serve, served
from vllm_dlm.scoring import body, route, scores

__all__ = ["processor", "serve", "served"]  # fixtures


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
