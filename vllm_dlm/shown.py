"""Values as error messages show them: a client's megabytes do not come back."""

import reprlib
from itertools import islice

LONGEST = 100


class _Brief(reprlib.Repr):
    """Cuts long or deeply nested values before they are rendered: the cost does not depend on the value's size."""

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
        except ValueError:  # Python writes no number of so many digits
            return f"a number of {x.bit_length()} bits"

    def repr_dict(self, x: dict, level: int) -> str:
        """In the order of the dict: reprlib would sort all of its keys."""
        return super().repr_dict(dict(islice(x.items(), self.maxdict + 1)), level)


_BRIEF = _Brief()


def shown(value) -> str:
    """`repr(value)`, shortened."""
    return short(_BRIEF.repr(value))


def short(name: str) -> str:
    """A name as it is, unless it is too long for a line."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
