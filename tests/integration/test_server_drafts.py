"""Drafts over HTTP."""

import httpx
import pytest

from tests.integration.serving import COPIED, COPY, chat, chat_text, options


@pytest.mark.parametrize("share", [0.2, 0.8, 1])
def test_a_draft_is_mended(ask, complete, share):
    """One letter is wrong, and the model knows it."""
    extra = options(dlm_start=" k b q e", dlm_remask=share) | {"max_tokens": 8}
    assert ask(COPY, 8, extra).choices[0].message.content == COPIED
    assert complete(chat_text(COPY), 8, extra).choices[0].text == COPIED
    pieces = list(ask(COPY, 8, extra, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == COPIED
    assert "".join(piece.choices[0].text for piece in complete(chat_text(COPY), 8, extra, stream=True)) == COPIED


def test_a_draft_that_nobody_doubts(ask):
    extra = options(dlm_start=" k b q e", dlm_remask=0)
    answer = ask(COPY, 4, extra | {"ignore_eos": True})
    assert answer.choices[0].message.content == " k b q e" and answer.usage.completion_tokens == 4


REFUSED = {
    "too long": (options(dlm_start=" a" * 20), "max_tokens: 16 is not supported: the starting text has 20 tokens"),
    "no share": (options(dlm_start="a", dlm_remask=-1), "dlm_remask: -1.0 is not valid, it must be between 0 and 1"),
    "no draft": (options(dlm_remask=0.5), "dlm_remask: 0.5 is not valid, it requires a starting text"),
    "no token": (options(dlm_start=[512]), "dlm_start: 512 is not supported: token ids must be between 0 and 511"),
    "a window": (options(dlm_start="a", dlm_window=3), "a starting text requires dlm_extent full"),
    "in the body": ({"dlm_start": "a"}, 'write it into "vllm_xargs"'),
}


@pytest.mark.parametrize(("body", "says"), REFUSED.values(), ids=REFUSED)
def test_refused(server, complete, body, says):
    for path, asked in (("completions", {"prompt": COPY}), ("chat/completions", {"messages": chat(COPY)})):
        for stream in (False, True):
            given = {"model": server.model, "max_tokens": 16, "stream": stream} | asked | body
            answer = httpx.post(f"{server.url}/v1/{path}", json=given, timeout=60, trust_env=False)
            assert answer.status_code == 400, (path, answer.text)
            assert says in answer.json()["error"]["message"], answer.text
    assert complete("Copy: a", 2).choices
