"""A canvas in a terminal: masks, grey guesses, tokens coloured by the step that filled them, and a line of numbers.

Without a terminal, it prints lines of plain text. Text from the server is passed through `printable`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from vllm_dlm.shown import printable
from vllm_dlm.view.frames import Replay

MASK, SPECIAL = "░", "∙"
#: colours of successive steps, repeated
COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red")
#: share of the canvas that is filled between two lines, without a terminal
PART = 0.2


class Screen:
    def __init__(self, console: Console):
        self.console = console
        self.begun = monotonic()
        self.begin: dict = {}
        self.replay = Replay(0)
        self.sums = {"recomputed": 0, "dense": 0, "read": 0, "of": 0}
        self.end: dict | None = None
        self.fault: str | None = None  # error message that replaces further frames
        self._shown = 0.0

    def take(self, message: dict) -> None:
        """Takes the `dlm` object of a chunk."""
        if "begin" in message:
            self.begin, self.begun = message["begin"], monotonic()
            self.replay = Replay(self.begin["canvas"])
            self._print(self.title)
        elif "end" in message:
            self.end = message["end"]
            self._print(self.canvas().plain, self.numbers)
        elif "error" in message:
            self.fault = printable(str(message["error"].get("message")), keep="")
        elif "step" in message:
            self._frame(message)

    def _frame(self, frame: dict) -> None:
        self.replay.apply(frame)
        for part in ("rows", "keys"):
            for name, value in frame[part].items():
                if name in self.sums:
                    self.sums[name] += value
        share = len(self.replay.filled) / max(self.replay.canvas, 1)
        if share >= self._shown + PART:
            self._shown = share
            self._print(f"step {frame['step']}: {self.canvas().plain}")

    def _print(self, *lines: str) -> None:
        if not self.console.is_terminal:
            for line in lines:
                self.console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    @contextmanager
    def live(self) -> Iterator[None]:
        if not self.console.is_terminal:
            yield
            return
        with Live(get_renderable=self.picture, console=self.console, refresh_per_second=20):
            yield

    # -- rendering -------------------------------------------------------------------------

    @property
    def title(self) -> str:
        named = (f"{kind} {self.begin[kind]}" for kind in ("decoding", "reuse", "selection", "extent"))
        return printable(f"{self.begin['model']}, {self.begin['canvas']} positions, {', '.join(named)}", keep="")

    def picture(self) -> Group:
        if not self.begin:
            return Group(Text("waiting for the first step", "dim"))
        return Group(Text(self.title, "dim"), self.canvas(), Text(self.numbers, "bold"))

    def canvas(self) -> Text:
        last = self.replay.last
        guesses = {entry[0]: entry[1] for entry in last["guesses"]} if last else {}
        found = Text()
        for position in range(self.replay.canvas):
            if entry := self.replay.filled.get(position):
                found.append(shown(entry[2]), COLOURS[entry[-1] % len(COLOURS)])
            elif self.console.is_terminal and position in guesses:
                found.append(shown(guesses[position]), "bright_black italic")
            else:
                found.append(MASK, "dim")
        return found

    @property
    def numbers(self) -> str:
        last, sums = self.replay.last, self.sums
        if last is None:
            return ""
        end = self.end or {}
        filled = len([at for at in self.replay.filled if at >= 0])
        seconds = end.get("seconds") or monotonic() - self.begun
        parts = [
            f"step {last['step']}",
            f"{filled} of {self.replay.canvas} filled",
            f"{(end.get('tokens') or filled) / max(seconds, 1e-3):.0f} tokens/s",
            f"{sums['recomputed'] / max(sums['dense'], 1):.0%} of the rows recomputed",
        ]
        if sums["of"]:
            parts.append(f"{sums['read'] / sums['of']:.0%} of the cached keys read")
        return ", ".join(parts)


def shown(text: str) -> str:
    if text.startswith("<|") and text.endswith("|>"):
        return SPECIAL
    return printable(text.replace("\n", "↵"), keep="") or "?"
