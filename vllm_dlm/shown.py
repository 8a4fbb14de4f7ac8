"""Shortened representations of values for error messages, so that these do not repeat megabytes of client input."""

import reprlib

LONGEST = 100


class _Brief(reprlib.Repr):
    """Truncates long or deeply nested values before they are rendered."""

    def __init__(self):
        super().__init__()
        self.maxstring = self.maxlong = self.maxother = LONGEST
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = LONGEST // 4
        self.fillvalue = "…"

    repr_bytes = reprlib.Repr.repr_str

    def repr_int(self, x: int, level: int) -> str:
        try:
            return super().repr_int(x, level)
        except ValueError:  # Python refuses to convert integers with too many digits
            return f"a number of {x.bit_length()} bits"


_BRIEF = _Brief()


def shown(value) -> str:
    """`repr(value)`, shortened."""
    return short(_BRIEF.repr(value))


def short(name: str) -> str:
    """`name`, truncated to LONGEST characters."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
