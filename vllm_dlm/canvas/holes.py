"""Holes of a template while they are filled, in any order and any number of positions at a time.

Two sets of automaton states are kept for each position: the states that the tokens before it can reach, and the states
from which the rest of the hole can be completed. A token may be at a position if it leads from a reachable state to one
from which the hole can be completed. Tokens that a step proposes for several positions are accepted one after the
other, the most probable first. A token that the accepted ones rule out stays a mask. A hole is therefore valid for
every decoding order.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from vllm_dlm.canvas.automaton import MASKED, Automaton

#: not the class of any token or of a mask
NO_CLASS = -3


class HoleProposal(NamedTuple):
    """A token that a step proposes for a position of a hole"""

    place: int  # position within the hole
    token_class: int
    number: int  # index among the proposals of the step


class Hole:
    """`length` positions of the canvas from `start` on. `classes`: token classes of the positions; None: all masked"""

    def __init__(self, start: int, length: int, automaton: Automaton, classes: Sequence[int] | None = None):
        self.start, self.length, self.automaton = start, length, automaton
        self.classes = [MASKED] * length if classes is None else list(classes)
        self.reachable = [automaton.starting, *[0] * length]  # [i]: states reached by the tokens before i
        self.completable = [*[0] * length, automaton.ending]  # [i]: states that the tokens from i on complete
        self._read(0, length)
        self._read_back(length - 1, 0)

    def _read(self, first: int, last: int) -> None:
        """Updates reachable states after classes from `first` to `last` have changed, until nothing changes."""
        states, same, after = self.reachable[first], (0, NO_CLASS), 0
        for index in range(first, self.length):
            if same != (states, each := self.classes[index]):  # in runs of masks, states become constant
                same, after = (states, each), self.automaton.after(states, each)
            if index >= last and after == self.reachable[index + 1]:
                return
            self.reachable[index + 1] = states = after

    def _read_back(self, last: int, first: int) -> None:
        states, same, before = self.completable[last + 1], (0, NO_CLASS), 0
        for index in range(last, -1, -1):
            if same != (states, each := self.classes[index]):
                same, before = (states, each), self.automaton.before(states, each)
            if index <= first and before == self.completable[index]:
                return
            self.completable[index] = states = before

    def put(self, classes: dict[int, int]) -> None:
        """`classes`: by position; MASKED turns a token back into a mask"""
        for index, each in classes.items():
            self.classes[index] = each
        if classes:
            first, last = min(classes), max(classes)
            self._read(first, last)
            self._read_back(last, first)

    def between(self, index: int) -> tuple[int, int]:
        """The states before and after a position"""
        return self.reachable[index], self.completable[index + 1]

    def fits(self, index: int, token_class: int) -> bool:
        """Whether a token of this class may be at a position, given the tokens at other positions"""
        return bool(self.automaton.after(self.reachable[index], token_class) & self.completable[index + 1])

    def accepted(self, proposals: list[HoleProposal]) -> list[HoleProposal]:
        """Puts the proposals that fit the hole's tokens and each other, with the same result as accepting them one by
        one. Each token only reduces the set of allowed tokens, so a proposal that does not fit now never will, and
        proposals that all fit together would be accepted one by one, too. If they do not all fit together, the first
        half is accepted before the second."""
        return self._accepted([each for each in proposals if self.fits(each.place, each.token_class)])

    def _accepted(self, fitting: list[HoleProposal]) -> list[HoleProposal]:
        if len(fitting) > 1 and not self._fit_together(fitting):
            half = len(fitting) // 2
            return self._accepted(fitting[:half]) + self.accepted(fitting[half:])
        self.put({each.place: each.token_class for each in fitting})
        return fitting

    def _fit_together(self, proposals: list[HoleProposal]) -> bool:
        classes = {each.place: each.token_class for each in proposals}
        place = min(classes)
        states = self.reachable[place]
        for index in sorted(classes):
            while place < index:
                if states == self.reachable[place]:  # nothing changes before the next token
                    states, place = self.reachable[index], index
                else:
                    states, place = self.automaton.after(states, self.classes[place]), place + 1
            states, place = self.automaton.after(states, classes[index]), index + 1
            if not states & self.completable[place]:
                return False
        return True

    def over(self) -> list[int]:
        """Masks that only an end token may fill. Every completion of the hole has ended before the first of them."""
        low, high = 0, self.length
        while low < high:
            middle = (low + high) // 2
            if self.reachable[middle + 1] & self.completable[middle + 1] == self.automaton.ended:
                high = middle
            else:
                low = middle + 1
        return [index for index in range(low, self.length) if self.classes[index] == MASKED]


class Holes:
    """The holes of one canvas."""

    def __init__(self, holes: Sequence[tuple[int, int, Automaton]], tokens: np.ndarray, mask_id: int, end_token: int):
        """`holes`: (start, length, automaton) of each; `end_token`: fills the rest of a hole that has ended"""
        self.holes, self.end_token = list[Hole](), end_token
        self.places: dict[int, tuple[Hole, int]] = {}  # position of the canvas -> hole and index in it
        for start, length, automaton in holes:
            own = tokens[start : start + length]
            classes = np.where(own == mask_id, MASKED, automaton.classes_of(own))
            hole = Hole(start, length, automaton, classes.tolist())
            self.holes.append(hole)
            self.places.update((start + index, (hole, index)) for index in range(length))

    def put(self, positions: Iterable[int], token: int | None) -> None:
        """Puts the token at the positions; None: a mask"""
        changed: dict[Hole, list[int]] = {}
        for position in positions:
            hole, index = self.places[position]
            changed.setdefault(hole, []).append(index)
        for hole, indices in changed.items():
            own = MASKED if token is None else int(hole.automaton.classes_of(np.array([token]))[0])
            hole.put(dict.fromkeys(indices, own))

    def accepted(self, positions: np.ndarray, tokens: np.ndarray, order: Iterable[int]) -> np.ndarray:
        """Puts the tokens that fit, in this order -> their indices, ascending"""
        taken, proposals = list[int](), dict[Hole, list[HoleProposal]]()
        for each in order:
            if (position := int(positions[each])) not in self.places:  # a hole of the prompt
                taken.append(each)
                continue
            hole, index = self.places[position]
            proposals.setdefault(hole, []).append(HoleProposal(index, NO_CLASS, each))
        for hole, own in proposals.items():
            classes = hole.automaton.classes_of(tokens[[each.number for each in own]]).tolist()
            own = [each._replace(token_class=known) for each, known in zip(own, classes, strict=True)]
            taken += [each.number for each in _one_by_one(hole, own)]
        return np.sort(np.array(taken, np.int64))

    def over(self) -> np.ndarray:
        """Puts the end token at masks that nothing else may fill -> their positions, ascending"""
        found = [hole.start + index for hole in self.holes for index in hole.over()]
        self.put(found, self.end_token)
        return np.array(sorted(found), np.int64)

    def between(self, position: int) -> tuple[Automaton, tuple[int, int]] | None:
        """The automaton of a position and the states before and after it; None: the position is in no hole, so any
        token is allowed"""
        if position not in self.places:
            return None
        hole, index = self.places[position]
        return hole.automaton, hole.between(index)

    def ended(self, position: int) -> bool:
        """Whether a position holds the end token of a hole, which is not part of the text"""
        if position not in self.places:
            return False
        hole, index = self.places[position]
        return hole.classes[index] == hole.automaton.end_class


def _one_by_one(hole: Hole, proposals: list[HoleProposal]) -> list[HoleProposal]:
    """Masks are filled together. Replacing a token may allow other tokens, so each replacement is accepted alone."""
    taken, masks = list[HoleProposal](), list[HoleProposal]()
    for each in proposals:
        if hole.classes[each.place] == MASKED:
            masks.append(each)
            continue
        taken += hole.accepted(masks)
        masks = []
        taken += hole.accepted([each])
    return taken + hole.accepted(masks)
