"""The holes of a template while they are filled, in whatever order and however many positions at once.

Of each position two sets of states are known: those that what stands before it
may have led to, and those from which what stands behind it may be read to the
end. A token may stand there if it leads from one of the first to one of the
second; then the hole can still be filled. Tokens that a step proposes for
several positions are taken one after the other, the most probable first, and
one that those before it have ruled out is left a mask: so a hole is valid
however it is decoded.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from vllm_dlm.automaton import Automaton

MASKED = -2


class Hole:
    """`length` positions of the canvas from `start` on."""

    def __init__(self, start: int, length: int, automaton: Automaton):
        self.start, self.length, self.automaton = start, length, automaton
        self.classes = np.full(length, MASKED, np.int64)  # of the tokens that stand
        self.before = np.zeros((length + 1, automaton.states), np.bool_)
        self.behind = np.zeros((length + 1, automaton.states), np.bool_)
        self.before[0, 0], self.behind[length, list(automaton.ends)] = True, True
        for index in range(length):
            self.before[index + 1] = self._read(index)
        for index in range(length - 1, -1, -1):
            self.behind[index] = self._read_back(index)

    def _edges(self, index: int) -> np.ndarray:
        """[2 or 3, E] that may be gone at a position"""
        own = self.classes[index]
        return self.automaton.edges if own == MASKED else self.automaton.by_class[int(own)]

    def _read(self, index: int) -> np.ndarray:
        start, end = self._edges(index)[:2]
        states = np.zeros(self.automaton.states, np.bool_)
        states[end[self.before[index, start]]] = True
        return states

    def _read_back(self, index: int) -> np.ndarray:
        start, end = self._edges(index)[:2]
        states = np.zeros(self.automaton.states, np.bool_)
        states[start[self.behind[index + 1, end]]] = True
        return states

    def allowed(self, index: int) -> np.ndarray:
        """The classes of tokens that may stand there, ascending, beside what stands elsewhere"""
        known, key = self.automaton.known, (self.before[index].tobytes(), self.behind[index + 1].tobytes())
        if key not in known:
            start, end, by = self.automaton.edges
            known[key] = np.unique(by[self.before[index, start] & self.behind[index + 1, end]]).astype(np.int16)
        return known[key]

    def put(self, index: int, token: int | None) -> None:
        """None: a mask"""
        self.classes[index] = MASKED if token is None else self.automaton.classes[token]
        for at in range(index, self.length):
            states = self._read(at)
            if (states == self.before[at + 1]).all():
                break
            self.before[at + 1] = states
        for at in range(index, -1, -1):
            states = self._read_back(at)
            if (states == self.behind[at]).all():
                break
            self.behind[at] = states

    def over(self) -> np.ndarray:
        """Masks at which nothing but an end may stand"""
        start, end, _ = self.automaton.writing
        goes_on = (self.before[:-1][:, start] & self.behind[1:][:, end]).any(1)
        return np.flatnonzero((self.classes == MASKED) & ~goes_on)


class Holes:
    """Of one canvas, from what stands in it."""

    def __init__(self, holes: Sequence[tuple[int, int, Automaton]], tokens: np.ndarray, mask_id: int, end_token: int):
        """`holes`: where each starts, its length, what it may hold; `end_token`: what fills the rest of one that has
        ended"""
        self.holes = [Hole(*each) for each in holes]
        self.end_token = end_token
        self.at: dict[int, tuple[Hole, int]] = {}
        for hole in self.holes:
            for index in range(hole.length):
                self.at[hole.start + index] = hole, index
                if (token := int(tokens[hole.start + index])) != mask_id:
                    hole.put(index, token)

    def put(self, positions: Iterable[int], token: int | None) -> None:
        for position in positions:
            hole, index = self.at[position]
            hole.put(index, token)

    def accepted(self, positions: np.ndarray, tokens: np.ndarray, order: Iterable[int]) -> np.ndarray:
        """Puts those of the tokens that go with what stands, in this order of theirs -> which, ascending"""
        taken = []
        for each in order:
            position, token = int(positions[each]), int(tokens[each])
            if position not in self.at:  # a hole of the prompt
                taken.append(each)
                continue
            hole, index = self.at[position]
            if hole.automaton.classes[token] in hole.allowed(index):
                hole.put(index, token)
                taken.append(each)
        return np.sort(np.array(taken, np.int64))

    def over(self) -> np.ndarray:
        """Puts ends where nothing else may stand -> positions, ascending"""
        found = [hole.start + index for hole in self.holes for index in hole.over().tolist()]
        self.put(found, self.end_token)
        return np.array(sorted(found), np.int64)

    def allowed(self, position: int) -> tuple[Automaton, bytes] | None:
        """What may stand there: classes of which automaton; None: anything, since it is in no hole of the template"""
        if position not in self.at:
            return None
        hole, index = self.at[position]
        return hole.automaton, hole.allowed(index).tobytes()

    def ended(self, position: int) -> bool:
        """An end stands there, which is no part of the text."""
        if position not in self.at:
            return False
        hole, index = self.at[position]
        return bool(hole.classes[index] == hole.automaton.end_class)
