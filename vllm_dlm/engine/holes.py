"""The holes of a template while they are filled, in whatever order and however many positions at once.

Two sets of states are kept for each position: those to which the tokens before it may lead, and those from which the
hole can be filled to its end. A token may be at a position if it leads from one of the first to one of the second
after it; then the hole can still be filled. Tokens that a step proposes for several positions are taken one after the
other, the most probable first, and one that those before it have ruled out is left a mask: so a hole is valid however
it is decoded.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from vllm_dlm.automaton import MASKED, Automaton

#: class of nothing: neither a token nor a mask
NO_CLASS = -3


class Wanted(NamedTuple):
    """A token proposed for a masked position of a hole"""

    at: int  # which position of the hole
    of: int  # its class
    proposal: int  # which one of the step's


class Hole:
    """`length` positions of the canvas from `start` on; `classes`: of the tokens that they have"""

    def __init__(self, start: int, length: int, automaton: Automaton, classes: Sequence[int] | None = None):
        self.start, self.length, self.automaton = start, length, automaton
        self.classes = [MASKED] * length if classes is None else list(classes)
        self.reachable = [automaton.starting, *[0] * length]  # [i]: by the tokens before i
        self.completable = [*[0] * length, automaton.ending]  # [i]: by the tokens from i on
        self._read(0, length)
        self._read_back(length - 1, 0)

    def _read(self, first: int, last: int) -> None:
        """Classes have changed between two positions. States change up to where they are again what they were."""
        states, same, after = self.reachable[first], (0, NO_CLASS), 0
        for index in range(first, self.length):
            if same != (states, of := self.classes[index]):  # runs of masks come to a state that stays
                same, after = (states, of), self.automaton.after(states, of)
            if index >= last and after == self.reachable[index + 1]:
                return
            self.reachable[index + 1] = states = after

    def _read_back(self, last: int, first: int) -> None:
        states, same, before = self.completable[last + 1], (0, NO_CLASS), 0
        for index in range(last, -1, -1):
            if same != (states, of := self.classes[index]):
                same, before = (states, of), self.automaton.before(states, of)
            if index <= first and before == self.completable[index]:
                return
            self.completable[index] = states = before

    def put(self, classes: dict[int, int]) -> None:
        """`classes`: of positions, MASKED where a token becomes a mask again"""
        for index, of in classes.items():
            self.classes[index] = of
        if classes:
            first, last = min(classes), max(classes)
            self._read(first, last)
            self._read_back(last, first)

    def between(self, index: int) -> tuple[int, int]:
        """The states before and after a position"""
        return self.reachable[index], self.completable[index + 1]

    def fits(self, index: int, of: int) -> bool:
        """A token of that class may be there, next to the tokens of other positions."""
        return bool(self.automaton.after(self.reachable[index], of) & self.completable[index + 1])

    def accepted(self, wanted: list[Wanted]) -> list[Wanted]:
        """Puts those that go with each other and with what is there, as if they came one by one. The more tokens there
        are, the fewer are allowed: tokens that do not fit now never will, and those that all fit together would have
        one by one. Where they do not, the first half of them comes before the second."""
        return self._accepted([each for each in wanted if self.fits(each.at, each.of)])

    def _accepted(self, fitting: list[Wanted]) -> list[Wanted]:
        if len(fitting) > 1 and not self._fit_together(fitting):
            half = len(fitting) // 2
            return self._accepted(fitting[:half]) + self.accepted(fitting[half:])
        self.put({each.at: each.of for each in fitting})
        return fitting

    def _fit_together(self, wanted: list[Wanted]) -> bool:
        classes = {each.at: each.of for each in wanted}
        at = min(classes)
        states = self.reachable[at]
        for index in sorted(classes):
            while at < index:
                if states == self.reachable[at]:  # nothing changes before the next token
                    states, at = self.reachable[index], index
                else:
                    states, at = self.automaton.after(states, self.classes[at]), at + 1
            states, at = self.automaton.after(states, classes[index]), index + 1
            if not states & self.completable[at]:
                return False
        return True

    def over(self) -> list[int]:
        """Masks at which nothing but an end may be. From the first of them on, every way to fill the hole has ended."""
        low, high = 0, self.length
        while low < high:
            middle = (low + high) // 2
            if self.reachable[middle + 1] & self.completable[middle + 1] == self.automaton.ended:
                high = middle
            else:
                low = middle + 1
        return [index for index in range(low, self.length) if self.classes[index] == MASKED]


class Holes:
    """Of one canvas, from what it has."""

    def __init__(self, holes: Sequence[tuple[int, int, Automaton]], tokens: np.ndarray, mask_id: int, end_token: int):
        """`holes`: where each starts, its length, what it may hold; `end_token`: what fills the rest of one that has
        ended"""
        self.holes, self.end_token = list[Hole](), end_token
        self.at: dict[int, tuple[Hole, int]] = {}
        for start, length, automaton in holes:
            own = tokens[start : start + length]
            classes = np.where(own == mask_id, MASKED, automaton.classes_of(own))
            hole = Hole(start, length, automaton, classes.tolist())
            self.holes.append(hole)
            self.at.update((start + index, (hole, index)) for index in range(length))

    def put(self, positions: Iterable[int], token: int | None) -> None:
        """None: a mask"""
        changed: dict[Hole, list[int]] = {}
        for position in positions:
            hole, index = self.at[position]
            changed.setdefault(hole, []).append(index)
        for hole, indices in changed.items():
            of = MASKED if token is None else int(hole.automaton.classes_of(np.array([token]))[0])
            hole.put(dict.fromkeys(indices, of))

    def accepted(self, positions: np.ndarray, tokens: np.ndarray, order: Iterable[int]) -> np.ndarray:
        """Puts those of the tokens that go with what is there, in this order of theirs -> which, ascending"""
        taken, wanted = list[int](), dict[Hole, list[Wanted]]()
        for each in order:
            if (position := int(positions[each])) not in self.at:  # a hole of the prompt
                taken.append(each)
                continue
            hole, index = self.at[position]
            wanted.setdefault(hole, []).append(Wanted(index, NO_CLASS, each))
        for hole, of_hole in wanted.items():
            classes = hole.automaton.classes_of(tokens[[each.proposal for each in of_hole]]).tolist()
            of_hole = [each._replace(of=of) for each, of in zip(of_hole, classes, strict=True)]
            taken += [each.proposal for each in _one_by_one(hole, of_hole)]
        return np.sort(np.array(taken, np.int64))

    def over(self) -> np.ndarray:
        """Puts ends where nothing else may be -> positions, ascending"""
        found = [hole.start + index for hole in self.holes for index in hole.over()]
        self.put(found, self.end_token)
        return np.array(sorted(found), np.int64)

    def between(self, position: int) -> tuple[Automaton, tuple[int, int]] | None:
        """Which states of which automaton are before and after it; None: it is in no hole of the template, so anything
        may be there"""
        if position not in self.at:
            return None
        hole, index = self.at[position]
        return hole.automaton, hole.between(index)

    def ended(self, position: int) -> bool:
        """An end is there, which is no part of the text."""
        if position not in self.at:
            return False
        hole, index = self.at[position]
        return hole.classes[index] == hole.automaton.end_class


def _one_by_one(hole: Hole, wanted: list[Wanted]) -> list[Wanted]:
    """Masks are filled together. A token that becomes another one frees others, so it is looked at by itself."""
    taken, masks = list[Wanted](), list[Wanted]()
    for each in wanted:
        if hole.classes[each.at] == MASKED:
            masks.append(each)
            continue
        taken += hole.accepted(masks)
        masks = []
        taken += hole.accepted([each])
    return taken + hole.accepted(masks)
