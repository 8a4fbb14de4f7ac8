"""Frames: changes of a canvas by one or more steps. docs/view.md describes their fields.

The scheduler and the front-end each keep a `History` of a canvas, with sums over its steps. A reader keeps the `Moment`
up to which it has read. When it reads, the history creates one frame with all later changes. A reader that does not
read costs nothing, and readers at the same moment share a frame.

Positions count from the start of the prompt, and from the start of the answer in JSON.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import numpy as np

#: minimum seconds between two frames of a request
INTERVAL = 0.03
#: number of entries that are written to JSON at a time; the event loop runs in between
SLICE = 512
#: fields of a frame that are sums over its steps
SUMS = ("steps", "ms", "live", "recomputed", "dense", "read", "of")
#: changes of positions; each position is in at most one list
CHANGES = ("set", "unset", "edited")
#: maximum number of tokens of a guess in addition to the proposed one
OTHERS = 3


@dataclass
class Guesses:
    """C masks that the last step read, and the most probable tokens there."""

    at: np.ndarray  # [C]
    token: np.ndarray  # [C] proposed tokens
    p: np.ndarray  # [C]
    likely: np.ndarray  # [n, C] tokens, the most probable ones
    shares: np.ndarray  # [n, C] their probabilities

    @classmethod
    def build(cls, at: np.ndarray, token: np.ndarray, p: np.ndarray, best: np.ndarray | None) -> "Guesses":
        """`best` [2, n, C]: likely tokens and their probabilities; None: not known"""
        likely, shares = np.zeros((2, 0, len(at))) if best is None else best
        short = np.int32, np.int32, np.float32, np.int32, np.float32
        return cls(*(x.astype(dtype) for x, dtype in zip((at, token, p, likely, shares), short, strict=True)))

    def entries(self, part: slice, prompt: int, text: dict[int, str]) -> list[list]:
        """[position, text, probability, others]"""
        others: list[list] = [[] for _ in range(len(self.at[part]))]
        likely, shares = self.likely[:, part].T, self.shares[:, part].T  # [C, n]
        chosen = (likely != self.token[part, None]) & (shares > 0)
        chosen &= chosen.cumsum(1) <= OTHERS
        found = chosen.nonzero()[0].tolist(), likely[chosen].tolist(), shares[chosen].tolist()
        for row, token, share in zip(*found, strict=True):
            others[row].append([text[token], number(share)])
        columns = (self.at[part] - prompt).tolist(), self.token[part].tolist(), self.p[part].tolist()
        return [
            [at, text[token], number(p), other]
            for (at, token, p), other in zip(zip(*columns, strict=True), others, strict=True)
        ]

    @property
    def tokens(self) -> np.ndarray:
        return np.unique(np.concatenate([self.token, self.likely.ravel()]))


NO_GUESSES = Guesses.build(np.zeros(0), np.zeros(0), np.zeros(0), None)


@dataclass
class Frame:
    """Changes of a canvas of N positions between two moments; A positions changed."""

    step: int  # the last step
    requests: int
    block: int
    at: np.ndarray  # [A]
    was: np.ndarray  # [A] bool: filled before
    filled: np.ndarray  # [A] bool: filled now
    token: np.ndarray  # [A]
    p: np.ndarray  # [A]
    changed_in: np.ndarray  # [A] step of the change
    sums: np.ndarray  # see SUMS
    shares: np.ndarray  # [2, N] shares of rows and of pages, summed over the steps
    guesses: Guesses = field(default_factory=lambda: NO_GUESSES)

    def head(self, prompt: int) -> dict[str, Any]:
        """Fields for JSON, without those that contain text"""
        sums = dict(zip(SUMS, self.sums.tolist(), strict=True))
        mean = self.shares / max(sums["steps"], 1)
        taken = self.was & ~self.filled
        return {
            "step": self.step,
            "steps": int(sums["steps"]),
            "ms": round(sums["ms"], 3),
            "requests": self.requests,
            "block": self.block,
            "unset": np.stack([self.at[taken] - prompt, self.changed_in[taken]], 1).tolist(),
            "rows": {name: int(sums[name]) for name in ("live", "recomputed", "dense")},
            "keys": {name: int(sums[name]) for name in ("read", "of")},
            "heat": {name: runs(mean[row], -prompt) for row, name in enumerate(("rows", "pages"))},
        }

    def written(self, kind: str) -> np.ndarray:
        """Entries of `set` or `edited`"""
        return np.flatnonzero(self.filled & (self.was if kind == "edited" else ~self.was))

    def entries(self, which: np.ndarray, prompt: int, text: dict[int, str]) -> list[list]:
        """[position, token, text, probability, step]"""
        columns = (self.at[which] - prompt, self.token[which], self.p[which], self.changed_in[which])
        return [
            [at, token, text[token], number(p), step]
            for at, token, p, step in zip(*(column.tolist() for column in columns), strict=True)
        ]

    @property
    def tokens(self) -> list[int]:
        """Tokens whose text is needed"""
        return np.union1d(self.token[self.filled], self.guesses.tokens).tolist()

    # -- between processes -----------------------------------------------------------------

    def pack(self) -> bytes:
        """Encodes the frame. Shares are run-length encoded, because most neighbours have equal shares."""
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        del arrays["shares"]
        turns = [np.flatnonzero(np.diff(row, prepend=np.nan)) for row in self.shares]
        arrays |= {f"turns{row}": at for row, at in enumerate(turns)}
        arrays |= {f"values{row}": self.shares[row][at] for row, at in enumerate(turns)}
        arrays |= {f"guesses.{name}": value for name, value in vars(self.guesses).items()}
        return msgspec.msgpack.encode(
            {
                "numbers": (self.step, self.requests, self.block, self.shares.shape[1]),
                "arrays": {name: (value.dtype.str, value.shape, value.tobytes()) for name, value in arrays.items()},
            }
        )

    @classmethod
    def unpack(cls, data: bytes) -> "Frame":
        message = msgspec.msgpack.decode(data)
        step, requests, block, length = message["numbers"]
        arrays = {
            name: np.frombuffer(content, dtype).reshape(shape)
            for name, (dtype, shape, content) in message["arrays"].items()
        }
        shares = np.zeros((2, length))
        for row in range(2):
            turns, values = arrays.pop(f"turns{row}"), arrays.pop(f"values{row}")
            shares[row] = np.repeat(values, np.diff(turns, append=length)) if length else 0
        names = [name for name in arrays if name.startswith("guesses.")]
        guesses = Guesses(**{name.removeprefix("guesses."): arrays.pop(name) for name in names})
        return cls(step, requests, block, shares=shares, guesses=guesses, **arrays)


class Moment(NamedTuple):
    """State of a canvas up to which a reader has read"""

    number: int  # number of frames before it
    filled: np.ndarray  # [N]
    sums: np.ndarray
    shares: np.ndarray  # [2, N]


class History:
    """State of a canvas of N positions, accumulated from its frames."""

    def __init__(self, filled: np.ndarray):
        """`filled` [N] bool: positions that are not masked at the start"""
        length = len(filled)
        self.count = 0
        self.filled = filled.copy()
        self.token, self.changed_in, self.changed = (np.zeros(length, np.int64) for _ in range(3))
        self.p = np.full(length, np.nan)
        self.sums, self.shares = np.zeros(len(SUMS)), np.zeros((2, length))
        self.last: Frame | None = None
        self._now: Moment | None = None

    def add(self, frame: Frame) -> None:
        self.count += 1
        at = frame.at
        self.changed[at] = self.count
        for name in ("filled", "token", "p", "changed_in"):
            getattr(self, name)[at] = getattr(frame, name)
        self.sums += frame.sums
        self.shares += frame.shares
        self.last, self._now = frame, None

    def now(self) -> Moment:
        if self._now is None:
            self._now = Moment(self.count, self.filled.copy(), self.sums.copy(), self.shares.copy())
        return self._now

    def since(self, moment: Moment) -> Frame:
        """One frame with all changes after a moment. Positions that were filled and masked again are left out."""
        assert self.last is not None, "no frame was added yet"
        at = np.flatnonzero(self.changed > moment.number)
        at = at[moment.filled[at] | self.filled[at]]
        return Frame(
            self.last.step,
            self.last.requests,
            self.last.block,
            at,
            moment.filled[at],
            self.filled[at],
            self.token[at],
            self.p[at],
            self.changed_in[at],
            self.sums - moment.sums,
            self.shares - moment.shares,
            self.last.guesses,
        )


# -- JSON ----------------------------------------------------------------------------------------


def number(value: float) -> float | None:
    """Rounded; None for values that JSON cannot express"""
    return round(value, 4) if -np.inf < value < np.inf else None


def runs(shares: np.ndarray, start: int = 0) -> list[list]:
    """Shares of positions from `start` on -> [first, last, share] of runs of equal share, except share 0"""
    shares = np.round(shares, 4)
    if not len(shares):
        return []
    begins = np.flatnonzero(np.diff(shares, prepend=np.nan))
    ends = np.append(begins[1:], len(shares)) - 1
    kept = shares[begins] > 0
    columns = begins[kept] + start, ends[kept] + start, shares[begins[kept]]
    return [list(entry) for entry in zip(*(column.tolist() for column in columns), strict=True)]


def json_slices(frame: Frame, prompt: int, text: dict[int, str]) -> Iterator[bytes]:
    """A frame as JSON, in small pieces."""
    yield msgspec.json.encode(frame.head(prompt))[:-1]
    for kind in ("set", "edited"):
        which = frame.written(kind)
        yield b',"%s":[' % kind.encode()
        for start in range(0, len(which), SLICE):
            yield json_entries(frame.entries(which[start : start + SLICE], prompt, text), first=not start)
        yield b"]"
    yield b',"guesses":['
    for start in range(0, len(frame.guesses.at), SLICE):
        part = slice(start, start + SLICE)
        yield json_entries(frame.guesses.entries(part, prompt, text), first=not start)
    yield b"]}"


def json_entries(entries: list, first: bool) -> bytes:
    """A piece of a JSON list without its brackets"""
    return (b"" if first else b",") + msgspec.json.encode(entries)[1:-1]


class Replay:
    """State of a canvas, accumulated from the JSON frames of a stream, for terminals and tests."""

    def __init__(self, canvas: int):
        self.canvas = canvas
        self.filled: dict[int, list] = {}  # position -> entry of `set` or `edited`
        self.last: dict[str, Any] | None = None

    def apply(self, frame: dict[str, Any]) -> None:
        for entry in frame["set"] + frame["edited"]:
            self.filled[entry[0]] = entry
        for position, _ in frame["unset"]:
            self.filled.pop(position, None)
        self.last = frame
