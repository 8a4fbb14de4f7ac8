"""Templates over HTTP."""

import json

import httpx
import openai
import pytest

from tests.engine.test_templates import PERSON, person
from tests.integration.serving import COPY, chat, chat_text, options

SEEDS = range(6)


def test_completions(complete):
    for seed in SEEDS:
        sampled = {"temperature": seed / 3, "seed": seed}
        answer = complete(chat_text(COPY), 100, options(dlm_template=PERSON), **sampled)
        person(answer.choices[0].text)
        assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens <= 100
        pieces = list(complete(chat_text(COPY), 100, options(dlm_template=PERSON), stream=True, **sampled))
        assert "".join(piece.choices[0].text for piece in pieces) == answer.choices[0].text
        assert len([piece for piece in pieces if piece.choices[0].text]) > 1  # canvas blocks


def test_chats_need_no_length(ask):
    for seed in SEEDS:
        sampled = {"temperature": seed / 3, "seed": seed, "max_tokens": openai.omit}
        answer = ask(COPY, extra=options(dlm_template=PERSON), **sampled)
        person(answer.choices[0].message.content)
        pieces = list(ask(COPY, extra=options(dlm_template=PERSON), stream=True, **sampled))
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert text == answer.choices[0].message.content


def test_what_the_model_knows(ask):
    """The hole ends where the answer does."""
    answer = ask(COPY, extra=options(dlm_template="[[20]]!"), max_tokens=openai.omit)
    assert answer.choices[0].message.content == " k b x e!"


def test_samples(complete):
    answer = complete(COPY, 40, options(dlm_template="one [[4]] two [[4]]"), n=2, temperature=1)
    assert all(choice.text.startswith("one ") and " two " in choice.text for choice in answer.choices)
    answer = complete(COPY, 40, options(dlm_template="one [[4]]"), logprobs=1)
    assert answer.choices[0].logprobs.token_logprobs[:3] == [0, 0, 0]


REFUSED = {
    "no text": (options(dlm_template=3), "dlm_template: 3 is not valid, it must be str"),
    "a list": (options(dlm_template=[3, 4]), "dlm_template: [3, 4] is not valid"),
    "nothing": (options(dlm_template="abc"), "it has no hole: a hole is [[n]]"),
    "no hole": (options(dlm_template="[[a]]"), "at character 0, '[[a]]' is not a hole"),
    "an empty hole": (options(dlm_template="[[0]]"), "the length of a hole must be between 1 and 512 tokens"),
    "alternatives": (options(dlm_template='[[1:one of "a"|]]'), "alternatives must be JSON strings"),
    "a long alternative": (options(dlm_template='[[1:one of "a"|"bcdefgh"]]'), "'bcdefgh' has at least 7 tokens"),
    "a special token": (options(dlm_template="<|endoftext|>[[1]]"), "contains a token that has no text"),
    "too long": (options(dlm_template="[[512]]" * 2) | {"max_tokens": 400}, "it has at least 1025 tokens with its end"),
    "megabytes": (options(dlm_template="[[1]]" + "y" * (10 << 20)), "characters, and the limit is 65536"),
    "many alternatives": (
        options(dlm_template="".join(f'[[3:one of "a{n}"]]' for n in range(100))),
        "limits.template_automata",
    ),
    "a stop": (options(dlm_template="[[9]]") | {"stop": ["a"]}, "stop: ['a'] is not supported"),
    "a stop token": (options(dlm_template="[[9]]") | {"stop_token_ids": [9]}, "stop_token_ids: [9] is not supported"),
    "too long for the canvas": (options(dlm_template="[[450]]") | {"max_tokens": 460}, "the maximum canvas of this"),
    "no room": (options(dlm_template="[[16]]"), "max_tokens: 16 is not supported: it must be at least 17"),
    "ignored ends": (options(dlm_template="[[9]]") | {"ignore_eos": True}, "ignore_eos: True is not supported"),
    "a suffix": (options(dlm_template="[[9]]", dlm_suffix="a"), "dlm_suffix: 'a' is not supported"),
    "few steps": (options(dlm_template="[[9]]", dlm_steps=1), "dlm_steps"),
    "in the body": ({"dlm_template": "[[9]]"}, 'write it into "vllm_xargs"'),
}


@pytest.mark.parametrize(("body", "says"), REFUSED.values(), ids=REFUSED)
def test_refused(server, complete, body, says):
    for path, asked in (("completions", {"prompt": COPY}), ("chat/completions", {"messages": chat(COPY)})):
        for stream in (False, True):
            given = {"model": server.model, "max_tokens": 16, "stream": stream} | asked | body
            given = {field: value for field, value in given.items() if value is not None}
            answer = httpx.post(f"{server.url}/v1/{path}", json=given, timeout=60, trust_env=False)
            assert answer.status_code == 400, (path, answer.text)
            assert says in answer.json()["error"]["message"], answer.text
    assert complete("Copy: a", 2).choices


def test_templates_are_no_business_of_others(complete):
    assert json.dumps(complete(chat_text(COPY), 8).choices[0].text) == '" k b x e"'
