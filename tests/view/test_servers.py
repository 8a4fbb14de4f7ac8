"""Servers that ask for a key, that refuse, that run something already; and runs that are stopped."""

import pytest

from tests.view import synthetic
from tests.view.pages import CANVAS, REFUSED, RUNS, A, cells, fill, finished, give_key, place, run, shown, written


def test_the_key_is_asked_for_and_kept_in_memory(visit, server):
    server.key = "right"
    page = visit()
    page.expected = [REFUSED + "401"]
    for key in ("wrong", "right"):
        give_key(page, key)
        page.until("!document.querySelector('#key-dialog').open || key.value === ''")
    page.until("model.textContent === 'mock'")
    run(page, tokens=CANVAS)
    assert page.evaluate("[{...localStorage}, {...sessionStorage}, document.cookie, key.value]") == [{}, {}, "", ""]


def test_a_late_refusal_of_no_key_does_not_ask_again(visit, server):
    server.key, server.late = "right", "/dlm/options"
    page = visit()
    page.expected = [REFUSED + "401"]
    give_key(page, "right")
    page.until("model.textContent === 'mock'")
    server.go.set()
    page.choose(f"{A} [data-option=reuse]", "fast_dllm")  # which the server offers
    assert not page.evaluate("document.querySelector('#key-dialog').open")


def test_no_key_no_run(visit, server):
    server.key = "right"
    page = visit()
    page.expected = [REFUSED + "401"]
    page.until("document.querySelector('#key-dialog').open")
    page.press("Escape")
    page.until("document.querySelector('#trouble').textContent")
    assert page.text("#trouble") == "Unauthorized"


def test_what_a_server_refuses_is_said(visit, server):
    server.refuses = f"dlm_steps: {synthetic.EVIL} is not valid"
    page = visit()
    page.expected = [REFUSED + "400"]
    fill(page, "#prompt", "Why?")
    page.click("#start")
    page.until("document.querySelector('#trouble').textContent")
    assert page.text("#trouble") == server.refuses
    server.refuses = ""
    run(page, tokens=CANVAS)
    assert page.evaluate("document.querySelector('#trouble').hidden")


@pytest.mark.parametrize("typed", ["{", "[1]", "null"])
def test_what_cannot_be_sent_is_not(visit, server, typed):
    page = visit()
    page.click("#start")
    assert page.text("#trouble") == "Type a prompt first."
    fill(page, "#prompt", "Why?")
    fill(page, f"{A} .wide input", typed)
    page.click("#start")
    assert "Further vllm_xargs" in page.text("#trouble")
    fill(page, f"{A} .wide input", '{"dlm_steps": 8}')
    page.click("#start")
    finished(page)
    assert [one["vllm_xargs"] for one in server.asked] == [{"dlm_steps": 8, "dlm_frames": 1}]


def test_a_run_can_be_stopped_and_seen_so_far(visit, server):
    server.holds_at = 8
    page = visit()
    page.click("#compare")
    fill(page, "#prompt", "Why?")
    page.click("#start")
    page.until("document.querySelectorAll('.canvas .set').length > 2")
    page.click("#stop")
    page.until("document.querySelector('#stop').hidden")
    assert page.text(f"{RUNS[0]} .failure") == "stopped"
    assert page.text(f"{RUNS[1]} .failure") == "not run"
    assert any("set" in names for names, _ in cells(page))
    assert len(server.asked) == 1
    page.press("ArrowLeft")
    assert place(page) == page.evaluate("Number(moment.max)") - 1


def test_a_request_of_somebody_else_is_watched(visit):
    page = visit()
    page.click("#watching summary")
    page.until("document.querySelector('#watched button')")
    page.click("#watched button")
    finished(page)
    assert page.text("#question") == "".join(f" p{position}" for position in range(synthetic.PROMPT))
    frames = synthetic.frames(24, {"dlm_reuse": "fast_dllm"})
    assert [text for _, text in cells(page)] == [shown(text) for _, text in sorted(written(frames).items())]
