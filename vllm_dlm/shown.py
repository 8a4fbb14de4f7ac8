"""Text of clients and servers for display. Error messages do not repeat megabytes of client input, and text from a
server cannot control a terminal."""

import reprlib
import unicodedata
from itertools import islice

LONGEST = 100


class _Brief(reprlib.Repr):
    """Truncates long or deeply nested values before they are rendered: the cost does not depend on their size."""

    def __init__(self):
        super().__init__()
        self.maxlevel = 2  # each level may multiply the work by maxlist
        self.maxstring = self.maxlong = self.maxother = LONGEST
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = LONGEST // 4
        self.fillvalue = "…"

    repr_bytes = reprlib.Repr.repr_str

    def repr_int(self, x: int, level: int) -> str:
        try:
            return super().repr_int(x, level)
        except ValueError:  # Python does not convert integers with too many digits
            return f"a number of {x.bit_length()} bits"

    def repr_dict(self, x: dict, level: int) -> str:
        """Keeps the order of the dict; reprlib would sort all of its keys."""
        return super().repr_dict(dict(islice(x.items(), self.maxdict + 1)), level)


_BRIEF = _Brief()


def shown(value) -> str:
    """`repr(value)`, shortened before it is rendered."""
    value = str(value) if isinstance(value, str) else value  # reprlib would render all of a subclass's text
    return short(_BRIEF.repr(value))


def printable(text: str, keep: str = "\n\t") -> str:
    """`text` with a visible sign for each character that could control a terminal: control characters (C0, DEL, C1),
    which begin escape sequences, marks that change the direction of text, and lone surrogates, which cannot be
    encoded."""
    return "".join(char if char in keep or not _controls(char) else _sign(char) for char in text)


def _controls(char: str) -> bool:
    direction = unicodedata.bidirectional(char) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    return direction or char in "\u061c\u200e\u200f" or unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")


def _sign(char: str) -> str:
    """A sign one column wide, because the text is laid out in cells"""
    if char < " ":
        return chr(0x2400 + ord(char))  # the picture of that control character
    return "\u2421" if char == "\x7f" else "\ufffd"


def short(name: str) -> str:
    """`name`, truncated to LONGEST characters."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
