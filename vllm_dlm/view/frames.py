"""A frame: what one step, or several, did to a canvas, as differences. Plain data that JSON and msgpack can carry.

Frames add up: `merged(a, b)` says what both did, in one frame, so whoever is slow is told the same in fewer words.
Positions count from the first one of the answer. Fields are described in docs/view.md.
"""

from typing import Any

import numpy as np

Frame = dict[str, Any]
#: [first, last, share], ascending, without those of share 0
Runs = list[list]

#: of an engine's output, where its kv_transfer_params have what it tells of steps
KEY = "vllm_dlm"
#: seconds between two frames of a request, at least
INTERVAL = 0.03
#: what happened to a position; none is in two of them
CHANGES = ("set", "unset", "edited")


def merged(first: Frame, then: Frame) -> Frame:
    """Both in one. What comes first must have come first."""
    weight = first["steps"] / (first["steps"] + then["steps"])
    return {
        "step": then["step"],
        "steps": first["steps"] + then["steps"],
        "ms": round(first["ms"] + then["ms"], 3),
        "requests": then["requests"],
        "block": then["block"],
        **changes(first, then),
        "guesses": then["guesses"],
        "rows": _sums(first["rows"], then["rows"]),
        "keys": _sums(first["keys"], then["keys"]),
        "heat": {name: averaged(first["heat"][name], then["heat"][name], weight) for name in then["heat"]},
    }


def changes(first: Frame, then: Frame) -> dict[str, list]:
    """What is left of the changes of both: a position that was filled and taken back is as it was before."""
    was_filled: dict[int, bool] = {}  # before both
    last: dict[int, tuple[str, list]] = {}
    for frame in (first, then):
        for kind in CHANGES:
            for entry in frame[kind]:
                was_filled.setdefault(entry[0], kind != "set")
                last[entry[0]] = kind, entry
    found: dict[str, list] = {kind: [] for kind in CHANGES}
    for position in sorted(last):
        kind, entry = last[position]
        if kind == "unset":
            if was_filled[position]:
                found["unset"].append(entry)
        else:
            found["edited" if was_filled[position] else "set"].append(entry)
    return found


def _sums(first: dict[str, int], then: dict[str, int]) -> dict[str, int]:
    return {name: first[name] + then[name] for name in then}


# -- shares of positions -------------------------------------------------------------------------


def runs(shares: np.ndarray, start: int = 0) -> Runs:
    """Of the positions from `start` on -> runs of equal share"""
    shares = np.round(shares, 4)
    if not len(shares):
        return []
    ends = [*(np.flatnonzero(np.diff(shares)) + 1).tolist(), len(shares)]
    begins = [0, *ends[:-1]]
    return [
        [start + begin, start + end - 1, float(shares[begin])]
        for begin, end in zip(begins, ends, strict=True)
        if shares[begin] > 0
    ]


def averaged(first: Runs, then: Runs, weight: float) -> Runs:
    """The mean share of each position; `weight` of the first"""
    if first == then:
        return then
    start = min(run[0] for run in first + then)
    shares = np.zeros(max(run[1] for run in first + then) + 1 - start)
    for part, share in ((first, weight), (then, 1 - weight)):
        for begin, end, value in part:
            shares[begin - start : end + 1 - start] += share * value
    return runs(shares, start)


# -- what the frames have told -------------------------------------------------------------------


class Replay:
    """A canvas as its frames tell it, for those who come later and for a terminal."""

    def __init__(self, canvas: int):
        self.canvas = canvas
        self.filled: dict[int, list] = {}  # position -> its entry of `set` or `edited`
        self.last: Frame | None = None

    def apply(self, frame: Frame) -> None:
        for entry in frame["set"] + frame["edited"]:
            self.filled[entry[0]] = entry
        for position, _ in frame["unset"]:
            self.filled.pop(position, None)
        self.last = frame

    @property
    def so_far(self) -> Frame | None:
        """One frame that tells it all: the last one, with everything that stands as `set`"""
        if self.last is None:
            return None
        return self.last | {"set": [self.filled[at] for at in sorted(self.filled)], "unset": [], "edited": []}
