"""What canvas/holes.py and canvas/automaton.py compute, in plain sets of states, from scratch for every question."""

import numpy as np

from vllm_dlm.canvas.automaton import MASKED, Automaton

State = int


class NaiveAutomaton:
    """A dictionary of the moves of each class, made of an automaton's edges"""

    def __init__(self, automaton: Automaton):
        self.starts, self.ends = set(automaton.starts), set(automaton.ends)
        self.moves: dict[int, set[tuple[State, State]]] = {}
        for start, end, of in automaton.edges.T.tolist():
            self.moves.setdefault(of, set()).add((start, end))
        self.end_class = automaton.end_class
        self.classes = np.full(automaton.size, automaton.usual)
        self.classes[automaton.tokens] = automaton.own

    def pairs(self, of: int) -> set[tuple[State, State]]:
        return set().union(*self.moves.values()) if of == MASKED else self.moves.get(of, set())


class NaiveHole:
    def __init__(self, length: int, automaton: NaiveAutomaton):
        self.automaton, self.classes = automaton, [MASKED] * length

    def reachable(self, index: int) -> set[State]:
        states = self.automaton.starts
        for of in self.classes[:index]:
            states = {end for start, end in self.automaton.pairs(of) if start in states}
        return states

    def completable(self, index: int) -> set[State]:
        states = self.automaton.ends
        for of in reversed(self.classes[index:]):
            states = {start for start, end in self.automaton.pairs(of) if end in states}
        return states

    def allowed(self, index: int) -> set[int]:
        before, after = self.reachable(index), self.completable(index + 1)
        return {of for of, pairs in self.automaton.moves.items() if any(s in before and e in after for s, e in pairs)}

    def accepted(self, wanted: list[tuple[int, int]]) -> list[int]:
        """(index, class) one after the other -> which of them"""
        taken = []
        for number, (index, of) in enumerate(wanted):
            if of in self.allowed(index):
                self.classes[index] = of
                taken.append(number)
        return taken

    def over(self) -> list[int]:
        return [
            index
            for index, of in enumerate(self.classes)
            if of == MASKED and self.allowed(index) == {self.automaton.end_class}
        ]
