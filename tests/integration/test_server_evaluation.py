"""What evaluations ask of a server, without lm_eval."""

import httpx
import pytest

from tests.integration.serving import COPIED, COPY, chat, chat_text
from vllm_dlm.evaluation.served import Served


@pytest.fixture
def served(server):
    return Served(f"{server.url}/v1/")


def test_texts(served, model):
    assert served.model == model
    kwargs = {"until": ["<never>", ""], "max_gen_toks": 16, "do_sample": False, "temperature": 0.7}
    assert served.text(chat_text(COPY), kwargs, 256) == COPIED
    assert served.text(chat_text(COPY), {"until": " x", "dlm_steps": 8}, 16) == " k b"
    short = served.text(chat_text(COPY), {"max_new_tokens": 2}, 256)
    assert short and COPIED.startswith(short) and short != COPIED
    sampled = {"temperature": 1.5, "do_sample": True, "seed": 3, "top_p": 0.99}
    assert served.text(COPY, sampled, 16) == served.text(COPY, sampled, 16) != served.text(COPY, {}, 16)


@pytest.mark.parametrize("name", ["num_beams", "steps", "repetition_penalty"])
def test_what_would_not_be_read_is_refused_by_name(served, name):
    with pytest.raises(ValueError, match=f"^generation_kwargs: {name} not supported"):
        served.text(COPY, {name: 2}, 16)


def test_what_the_server_refuses_is_passed_on(served):
    with pytest.raises(ValueError, match=r"HTTP 400.*mc_num"):
        served.likelihood("a", " b", mc_num=0)


def test_likelihoods(served):
    """A space at the end of the context belongs to the continuation."""
    how = {"method": "blocks", "steps": 4}
    (wanted,) = served.post("/v1/dlm/score", context=COPY, continuation=" k b", **how)["data"]
    assert served.likelihood(f"{COPY} ", "k b", **how) == (wanted["logprob"], wanted["is_greedy"])
    assert served.likelihood(COPY, " k b", **how) == (wanted["logprob"], wanted["is_greedy"])
    with pytest.raises(ValueError, match=r"^bos: "):
        served.likelihood(" ", "k b", **how)


def test_chats_are_rendered(served):
    assert served.rendered(chat(COPY), generate=True) == chat_text(COPY)


def test_the_key_is_sent(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    served = Served("http://127.0.0.1:1", model="m")
    assert served.http.headers["Authorization"] == "Bearer secret"
    with pytest.raises(httpx.ConnectError):
        Served("http://127.0.0.1:1")
