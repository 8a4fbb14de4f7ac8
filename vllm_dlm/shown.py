"""Values as error messages show them: a client's megabytes do not come back."""

LONGEST = 100


def shown(value) -> str:
    """`repr(value)`, shortened. Long strings are cut before they are rendered."""
    text = repr(value[:LONGEST] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def short(name: str) -> str:
    """A name as it is, unless it is too long for a line."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
