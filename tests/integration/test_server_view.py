"""Frames, trajectories and watched requests over HTTP, with the `openai` client and without."""

import json
import threading
import time

import httpx
import openai
import pytest
from rich.console import Console

from tests.integration.serving import BLOCK, COPIED, COPY, KEY, chat, chat_text, options
from vllm_dlm.view.frames import Replay
from vllm_dlm.view.terminal import follow

HEADERS = {"Authorization": f"Bearer {KEY}"}


def get(server, path: str, headers=HEADERS):
    return httpx.get(f"{server.url}{path}", headers=headers, timeout=60, trust_env=False)


def read(stream) -> tuple[dict[int, str], list[dict], dict[int, list[int]]]:
    """-> text of each choice, frames and the like, trajectories"""
    texts, told, filled = {}, [], {}
    for chunk in stream:
        for choice in chunk.choices:
            said = choice.delta.content if hasattr(choice, "delta") else choice.text
            texts[choice.index] = texts.get(choice.index, "") + (said or "")
        if message := (chunk.model_extra or {}).get("dlm"):
            if "trajectory" in message:
                assert chunk.choices[0].finish_reason
                filled[message.get("choice", 0)] = message["trajectory"]
            else:
                told.append(message)
    return texts, told, filled


def replayed(told: list[dict], choice: int = 0) -> list[str]:
    """Texts of the tokens, as far as they are filled from the first on"""
    replay = Replay(0)
    for message in told:
        if message.get("choice", 0) == choice and "step" in message:
            replay.apply(message)
    texts = []
    while entry := replay.filled.get(len(texts)):
        texts.append(entry[2])
    return texts


def create(server, kind: str, stream: bool = True, **fields):
    fields = {"max_tokens": 16, "temperature": 0, "stream": stream, "model": server.model} | fields
    if kind == "chat":
        return server.client.chat.completions.create(messages=chat(COPY), **fields)
    return server.client.completions.create(**{"prompt": chat_text(COPY)} | fields)


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_a_stream_with_frames_says_what_one_without_does(viewed, kind):
    plain, told, _ = read(create(viewed, kind))
    assert plain == {0: COPIED} and not told
    texts, told, filled = read(create(viewed, kind, extra_body=options(dlm_frames=1, dlm_trajectory=1)))
    assert texts == plain
    first, *frames, last = told
    assert first["begin"]["canvas"] == 16 and first["begin"]["block_length"] == BLOCK
    assert "".join(text for (text,) in first["begin"]["prompt"]).endswith("assistant<|end_header_id|>\n\n")
    assert first["begin"]["prompt_tokens"] == len(first["begin"]["prompt"])
    assert "".join(replayed(told)).startswith(COPIED)
    tokens = last["end"]["tokens"]
    assert last["end"]["finish_reason"] == "stop" and last["end"]["steps"] == frames[-1]["step"] == BLOCK
    assert len(filled[0]) == tokens and set(filled[0]) <= set(range(1, BLOCK + 1))
    assert sum(frame["steps"] for frame in frames) == BLOCK


def test_a_response_has_its_trajectory(viewed):
    answer = create(viewed, "chat", stream=False, extra_body=options(dlm_trajectory=1))
    steps = answer.model_extra["dlm"]["trajectory"]
    assert len(steps) == answer.usage.completion_tokens and answer.choices[0].message.content == COPIED
    more = create(
        viewed, "completion", stream=False, n=2, temperature=0.5, seed=1, extra_body=options(dlm_trajectory=1)
    )
    told = more.model_extra["dlm"]
    assert [own["choice"] for own in told] == [0, 1]
    assert sum(len(own["trajectory"]) for own in told) == more.usage.completion_tokens
    assert create(viewed, "chat", stream=False, extra_body=options(dlm_trajectory=0)).model_extra.get("dlm") is None


def test_choices_and_prompts_are_told_apart(viewed):
    fields = {"prompt": [chat_text(COPY), chat_text("Copy: z y")], "n": 2, "temperature": 0.3, "seed": 5}
    texts, told, filled = read(
        create(viewed, "completion", extra_body=options(dlm_frames=1, dlm_trajectory=1), **fields)
    )
    assert set(texts) == set(filled) == {0, 1, 2, 3}
    for choice, text in texts.items():
        assert "".join(replayed(told, choice)).startswith(text)


def test_a_stop_string_ends_the_frames_too(viewed):
    texts, told, filled = read(create(viewed, "chat", stop=["x"], extra_body=options(dlm_frames=1, dlm_trajectory=1)))
    assert texts == {0: " k b "} and told[-1]["end"]["finish_reason"] == "stop"
    assert "".join(replayed(told)).startswith(" k b x")
    assert len(filled[0]) == told[-1]["end"]["tokens"]


def test_tokens_never_wait_for_who_does_not_read_and_frames_are_merged(viewed):
    """A stream that is read late has fewer frames, and the same tokens."""
    extra = options(dlm_frames=1, dlm_block_length=64) | {"ignore_eos": True}
    stream = create(viewed, "completion", max_tokens=64, extra_body=extra)
    _, told, _ = read(stream)
    frames = [message for message in told if "step" in message]
    assert sum(frame["steps"] for frame in frames) == frames[-1]["step"] == 64
    assert len(replayed(told)) == 64


def test_others_may_watch(viewed):
    assert get(viewed, "/dlm/requests").json() == []
    answers = []
    body = {"ignore_eos": True} | options(dlm_watch=1, dlm_frames=1)
    asking = threading.Thread(
        target=lambda: answers.append(read(create(viewed, "chat", max_tokens=96, extra_body=body)))
    )
    asking.start()
    listed = wait_for(lambda: [one for one in get(viewed, "/dlm/requests").json() if one["canvas"]])
    assert listed[0]["canvas"] == 96 and listed[0]["reuse"] == "none" and listed[0]["prompt_tokens"] > 4
    told = []
    with httpx.stream(
        "GET", f"{viewed.url}/dlm/watch/{listed[0]['request']}", headers=HEADERS, timeout=60, trust_env=False
    ) as events:
        for line in events.iter_lines():
            if line:
                told.append(json.loads(line.removeprefix("data: ")))
    asking.join()
    ((texts, own, _),) = answers
    assert "begin" in told[0] and "end" in told[-1] and told[-1]["end"]["finish_reason"] == "length"
    assert replayed(told) == replayed(own) and len(replayed(told)) == 96
    assert get(viewed, "/dlm/requests").json() == []
    assert get(viewed, f"/dlm/watch/{listed[0]['request']}").status_code == 404
    assert texts[0]


def wait_for(found, seconds: float = 60):
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return value


def test_requests_that_share_an_id_see_their_own_frames(viewed):
    """With the number of choices equal or not, at the same time and one after the other, as proxies try again"""
    prompts = chat_text(COPY), chat_text("Copy: z y")

    def ask(prompt: str, n: int, answers: dict) -> None:
        stream = create(
            viewed,
            "completion",
            prompt=prompt,
            n=n,
            temperature=0.3,
            seed=5,
            extra_headers={"X-Request-Id": "one"},
            extra_body=options(dlm_frames=1, dlm_watch=1, dlm_trajectory=1),
        )
        answers[prompt] = read(stream)

    for turn in range(6):
        answers: dict = {}
        choices = (3, 1) if turn % 2 else (2, 2)
        asking = [threading.Thread(target=ask, args=(*each, answers)) for each in zip(prompts, choices, strict=True)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        for prompt, n in zip(prompts, choices, strict=True):
            texts, told, filled = answers[prompt]
            begun = [message["begin"] for message in told if "begin" in message]
            assert ["".join(text for (text,) in begin["prompt"]) for begin in begun] == [prompt] * n
            assert sorted(texts) == sorted(filled) == list(range(n))
            for choice, text in texts.items():
                assert text and "".join(replayed(told, choice)).startswith(text)
    assert get(viewed, "/dlm/requests").json() == []


def test_a_client_that_leaves_takes_its_request_along(viewed):
    body = {"ignore_eos": True} | options(dlm_watch=1, dlm_frames=1)
    stream = create(viewed, "chat", max_tokens=800, extra_body=body)
    next(iter(stream))
    assert get(viewed, "/dlm/requests").json()
    stream.close()
    wait_for(lambda: get(viewed, "/dlm/requests").json() == [])
    wait_for(lambda: viewed.metrics()["vllm:num_requests_running"] == 0)


def test_a_key_guards_what_has_data(viewed):
    assert get(viewed, "/dlm", {}).status_code == 200 and "<" in get(viewed, "/dlm", {}).text
    for path in ("/dlm/options", "/dlm/requests", "/dlm/watch/any"):
        assert get(viewed, path, {}).status_code == 401
        assert get(viewed, path, {"Authorization": "Bearer another"}).status_code == 401
        assert get(viewed, path).status_code in (200, 404)


@pytest.mark.parametrize("option", ["dlm_frames", "dlm_watch", "dlm_trajectory"])
def test_a_wrong_value_is_refused(viewed, option):
    with pytest.raises(openai.BadRequestError, match=option):
        create(viewed, "chat", extra_body=options(**{option: 2}))


def test_a_terminal_follows(viewed, capsys):
    screen = follow(Console(width=80), viewed.url, COPY, 16, {"dlm_reuse": "dllm_cache"}, key=KEY)
    said = capsys.readouterr().out
    assert "\x1b" not in said and COPIED.strip() in said
    assert "reuse dllm_cache" in said and "of the rows recomputed" in said and screen.end["finish_reason"] == "stop"


def test_many_front_ends_are_refused():
    from argparse import Namespace

    from vllm_dlm.integration.cli import from_cli_args

    make = from_cli_args(lambda cls, args: Namespace(additional_config=None))
    assert make(None, Namespace(dlm_view=True, api_server_count=None)).additional_config == {"dlm_view": True}
    with pytest.raises(ValueError, match="--api-server-count 1"):
        make(None, Namespace(dlm_view=True, api_server_count=2))
