"""Values as error messages show them: a client's megabytes do not come back."""

import reprlib

LONGEST = 100


class _Brief(reprlib.Repr):
    """Cuts what is long or deeply nested before it is rendered."""

    def __init__(self):
        super().__init__()
        self.maxstring = self.maxlong = self.maxother = LONGEST
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = LONGEST // 4
        self.fillvalue = "…"

    repr_bytes = reprlib.Repr.repr_str

    def repr_int(self, x: int, level: int) -> str:
        try:
            return super().repr_int(x, level)
        except ValueError:  # Python writes no number of so many digits
            return f"a number of {x.bit_length()} bits"


_BRIEF = _Brief()


def shown(value) -> str:
    """`repr(value)`, shortened before it is rendered."""
    value = str(value) if isinstance(value, str) else value  # reprlib renders all of a subclass's
    return short(_BRIEF.repr(value))


def short(name: str) -> str:
    """A name as it is, unless it is too long for a line."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
