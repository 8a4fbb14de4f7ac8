"""The page of a server that serves the bundled checkpoint; tests/view has what it does with frames of every kind."""

import threading

import pytest

from tests.integration.serving import COPIED, COPY, KEY, chat, options
from tests.view.pages import REFUSED, RUNS, A, B, cells, figures, fill, finished, slide
from tools.browser import BrowserError


@pytest.fixture
def server(viewed):
    return viewed


@pytest.fixture
def ask(viewed):
    def create(question: str, max_tokens: int, extra: dict | None = None):
        return viewed.client.chat.completions.create(
            model=viewed.model, messages=chat(question), max_tokens=max_tokens, temperature=0, extra_body=extra
        )

    return create


@pytest.fixture
def page(visit):
    """It was told the key."""
    page = visit()
    page.expected = [REFUSED]
    page.until("document.querySelector('#key-dialog').open")
    page.write(KEY)
    page.press("Enter")
    page.until("model.textContent")
    return page


def text(page, run: str = RUNS[0]) -> str:
    """Of the answer, without what lies behind its end"""
    return "".join(text for names, text in cells(page, run) if "set" in names.split() and "special" not in names)


def test_two_policies_answer_the_same(page, visit, exported, ask):
    page.choose(f"{B} [data-option=reuse]", "fast_dllm")
    fill(page, "#prompt", COPY)
    fill(page, "#max-tokens", "16")
    page.click("#compare")
    page.click("#start")
    finished(page)
    answer = ask(COPY, max_tokens=16)
    assert answer.choices[0].message.content == COPIED
    assert [text(page, run) for run in RUNS] == [COPIED, COPIED]
    assert not any("differs" in names for run in RUNS for names, _ in cells(page, run))
    steps = [figures(page, run)["steps"] for run in RUNS]
    assert steps == ["8", "8"]  # one token each in the canvas block that holds the answer
    shares = [float(figures(page, run)["rows"].split()[0]) for run in RUNS]
    assert 0 < shares[1] < shares[0] <= 100
    names = page.evaluate(f"[...document.querySelectorAll('{A} [data-option=decoding] option')].map((o) => o.text)")
    assert {"low_confidence", "wino", "local_leap"} <= set(names)
    file = exported(page)
    assert KEY not in file.read_text()
    there = visit(file.as_uri())
    slide(there, 999)
    assert [cells(there, run) for run in RUNS] == [cells(page, run) for run in RUNS]


def test_what_the_server_refuses_is_said(page):
    fill(page, "#prompt", COPY)
    fill(page, f"{A} .wide input", '{"dlm_steps": 0}')
    page.click("#start")
    page.until("document.querySelector('#trouble').textContent")
    assert "dlm_steps" in page.text("#trouble")


def test_a_request_of_somebody_else_is_watched(page, ask):
    over = threading.Event()

    def keep_asking() -> None:
        while not over.is_set():
            ask(COPY, max_tokens=64, extra=options(dlm_watch=1) | {"ignore_eos": True})

    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        page.click("#watching summary")
        for _ in range(20):
            page.click("#look")
            try:
                page.until("document.querySelector('#watched button')", timeout=2)
                page.click("#watched button")
            except (BrowserError, TypeError):
                continue  # that one had ended
            finished(page)
            if "tokens in" in page.text("#said"):
                break
    finally:
        over.set()
        asking.join()
    assert page.text("#said").startswith("64 tokens in 64 steps")
    assert text(page).startswith(COPIED)
    assert COPY in page.text("#question")
