"""What reaches a terminal: text of models and servers, and nothing that a terminal obeys."""

import io
import re

import pytest
from rich.console import Console

from tests.view import synthetic
from vllm_dlm.client import Progress
from vllm_dlm.demo.questions import questions
from vllm_dlm.demo.screen import Screen as DemoScreen
from vllm_dlm.shown import printable
from vllm_dlm.view import terminal
from vllm_dlm.view.screen import Screen

#: sets a colour, the title, the clipboard, clears the screen, goes back, changes direction; and Rich's markup
HOSTILE = [
    "\x1b[31m", "\x1b]0;title\x07", "\x1b]52;c;cm0gLXJm\x07", "\x1bc", "\x9b2J", "\x90q\x9c", "\r", "\x08\x08", "\x00",
    "\x7f", "\u202etxt.exe", "\u2066x\u2069", "\u200f", "\u2028", "\ud800",
]  # fmt: skip
MARKUP = "[red]red[/red] [link=file:///etc]x[/link] :skull: [/]"
#: what Rich itself writes to draw a picture: colours, and moves of whole lines
OWN = re.compile(r"\x1b\[[\d;]*[mAK]|\x1b\[\?25[lh]|\r")
BAD = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=200, height=50, color_system="standard")


def written(console: Console) -> str:
    return console.file.getvalue()


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_that_a_terminal_obeys_is_printable(text):
    found = printable(f"a{text}b")
    assert not BAD.search(found) and found[0] == "a" and found[-1] == "b" and len(found) == len(text) + 2
    found.encode()


def test_what_is_text_stays():
    for text in ("plain", "two\nlines\tand a tab", "größer 漢字 🙂 👩‍💻 नि", MARKUP):
        assert printable(text) == text


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_canvas_of_hostile_tokens(is_terminal):
    shown = console(is_terminal)
    screen = Screen(shown)
    frames = synthetic.frames(24, {})
    hostile = "".join(HOSTILE) + MARKUP
    frames[0]["begin"]["model"] = frames[0]["begin"]["reuse"] = hostile
    with screen.live():
        for frame in frames:
            for kind in ("set", "edited"):
                for entry in frame.setdefault(kind, []):
                    entry[2] = hostile
            frame.setdefault("unset", [])
            for guess in frame.get("guesses", []):
                guess[1] = hostile
            screen.take(frame)
        assert not BAD.search(OWN.sub("", screen.title + screen.canvas().plain))
    found = OWN.sub("", written(shown))
    assert not BAD.search(found) and "\x1b" not in found
    assert "[red]red[/red]" in found.replace("\n", "") and ":skull:" in found


@pytest.mark.parametrize("is_terminal", [True, False])
def test_hostile_answers_in_the_demo(is_terminal):
    shown = console(is_terminal)
    screen = DemoScreen(shown, questions()[:1], 8)
    screen.progress[0] = Progress("".join(HOSTILE) + MARKUP, 8, "stop")
    with screen.live():
        screen.finished(0)
    found = OWN.sub("", written(shown))
    assert not BAD.search(found) and "[red]red" in found


def test_errors_of_a_server(monkeypatch, capsys):
    def follow(*_, **__):
        raise terminal.RequestError("HTTP 400: " + "".join(HOSTILE))

    monkeypatch.setattr(terminal, "follow", follow)
    assert terminal.main(["http://127.0.0.1:1", "prompt"]) == 1
    assert not BAD.search(capsys.readouterr().err)


def test_an_error_in_the_place_of_frames_is_shown_after_the_answer():
    screen = Screen(console(False))
    screen.take({"error": {"message": "\x1b[31mgone"}})
    assert screen.fault == "␛[31mgone"
