"""What a hole may hold, as an automaton over tokens.

Tokens that do the same to every state are one class; the tokens that end a
hole early are a class of their own, which leads from where the hole may end to
a state that nothing else leaves. Every token is known by its text, so what is
accepted is a text, however it is cut into tokens.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

#: of a token: from which state to which
Moves = tuple[tuple[int, int], ...]
#: of no class: such a token may never stand in the hole
NEVER = -1
#: complete contents of a JSON string, so that any sequence of them is one
STRING = re.compile(r'(?:[^"\\\x00-\x1f\ud800-\udfff]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})+')
NUMERIC = re.compile(r"[-+.eE0-9]+")

#: -?(0|[1-9]d*)(.d+)?([eE][+-]?d+)?, state -> character -> state; d is a digit, n one that is not 0
NUMBER = (
    {"-": 1, "0": 2, "n": 3},  # nothing
    {"0": 2, "n": 3},  # a minus
    {".": 4, "e": 6},  # 0
    {"d": 3, ".": 4, "e": 6},  # a whole number
    {"d": 5},  # a point
    {"d": 5, "e": 6},  # a fraction
    {"s": 7, "d": 8},  # e
    {"d": 8},  # its sign
    {"d": 8},  # an exponent
)
NUMBER_ENDS = (2, 3, 5, 8)


@dataclass(frozen=True, eq=False)
class Automaton:
    states: int
    ends: tuple[int, ...]  # states in which a hole may end
    edges: np.ndarray  # [3, E] int32: from, to, by a token of which class
    classes: np.ndarray  # [V] int16 of each token, or NEVER
    end_class: int

    @cached_property
    def by_class(self) -> dict[int, np.ndarray]:
        """Of each class its edges"""
        return {int(each): self.edges[:2, self.edges[2] == each] for each in np.unique(self.edges[2])}

    @cached_property
    def known(self) -> dict[tuple[bytes, bytes], np.ndarray]:
        """Between sets of states: the classes that lead from one to the other"""
        return {}

    @cached_property
    def bits(self) -> dict[tuple[bytes, int], np.ndarray]:
        """Of sets of classes: a bit for each token"""
        return {}

    @cached_property
    def writing(self) -> np.ndarray:
        """The edges that do not end the hole"""
        return self.edges[:, self.edges[2] != self.end_class]

    def plain(self) -> dict:
        """As data that travels with a request: tokens of the commonest class are left out."""
        values, counts = np.unique(self.classes, return_counts=True)
        usual = int(values[counts.argmax()])
        others = np.flatnonzero(self.classes != usual)
        return {
            "states": self.states, "ends": list(self.ends), "edges": self.edges.tobytes(), "size": len(self.classes),
            "usual": usual, "tokens": others.astype(np.int32).tobytes(), "of": self.classes[others].tobytes(),
            "end_class": self.end_class,
        }  # fmt: skip

    @classmethod
    def of_plain(cls, plain: dict) -> "Automaton":
        classes = np.full(plain["size"], plain["usual"], np.int16)
        classes[np.frombuffer(plain["tokens"], np.int32)] = np.frombuffer(plain["of"], np.int16)
        edges = np.frombuffer(plain["edges"], np.int32).reshape(3, -1)
        return cls(plain["states"], tuple(plain["ends"]), edges, classes, plain["end_class"])


def built(
    states: int, ends: Iterable[int], moves: Iterable[tuple[int, Moves]], size: int, end_tokens: Iterable[int]
) -> Automaton:
    """A state is added, behind an early end."""
    classes, edges = np.full(size, NEVER, np.int16), []
    known: dict[Moves, int] = {}
    for token, pairs in moves:
        if pairs not in known:
            known[pairs] = len(known)
            edges += [(start, end, known[pairs]) for start, end in pairs]
        classes[token] = known[pairs]
    end_class, done = len(known), states
    classes[list(end_tokens)] = end_class
    edges += [(state, done, end_class) for state in (*ends, done)]
    table = np.array(edges, np.int32).T.copy()
    return Automaton(states + 1, (*ends, done), table, classes, end_class)


def free(size: int, end_tokens: Sequence[int], mask_id: int) -> Automaton:
    written = np.setdiff1d(np.arange(size), [*end_tokens, mask_id]).tolist()
    return built(1, (0,), ((token, ((0, 0),)) for token in written), size, end_tokens)


def string(texts: Sequence[str | None], end_tokens: Sequence[int]) -> Automaton:
    """`texts`: of each token, None where it is part of a character, or no text"""
    written = (token for token, text in enumerate(texts) if text and STRING.fullmatch(text))
    return built(1, (0,), ((token, ((0, 0),)) for token in written), len(texts), end_tokens)


def number(texts: Sequence[str | None], end_tokens: Sequence[int]) -> Automaton:
    moves = []
    for token, text in enumerate(texts):
        if text and NUMERIC.fullmatch(text):
            pairs = tuple((state, end) for state in range(len(NUMBER)) if (end := _read(state, text)) is not None)
            if pairs:
                moves.append((token, pairs))
    return built(len(NUMBER), NUMBER_ENDS, moves, len(texts), end_tokens)


def _read(state: int, text: str) -> int | None:
    for char in text:
        kinds = {"e": "e", "E": "e", "+": "s", "-": "s-", "0": "0d", ".": "."}.get(char, "nd")
        states = [NUMBER[state][kind] for kind in kinds if kind in NUMBER[state]]
        if not states:
            return None
        state = states[0]
    return state


def one_of(
    alternatives: Sequence[str], ids_of: Mapping[str, Sequence[int]], tokenized: Callable[[str], list[int]],
    texts: Sequence[str | None], end_tokens: Sequence[int],
) -> Automaton:  # fmt: skip
    """A tree of characters. `ids_of`: which tokens are a text. Where a tokenizer cuts an alternative inside a
    character, its tokens are a path beside the tree."""
    tree: list[dict[str, int]] = [{}]
    moves: dict[int, list[tuple[int, int]]] = {}
    ends = set()
    for alternative in alternatives:
        state = 0
        for char in alternative:
            if char not in tree[state]:
                tree[state][char] = len(tree)
                tree.append({})
            state = tree[state][char]
        ends.add(state)
    for start in range(len(tree)):
        reached = [(start, "")]
        while reached:
            state, text = reached.pop()
            reached += [(child, text + char) for char, child in tree[state].items()]
            for token in ids_of.get(text, ()):
                moves.setdefault(token, []).append((start, state))
    states = len(tree)
    for alternative in alternatives:
        tokens = tokenized(alternative)
        if any(texts[token] is None for token in tokens):
            for at, token in enumerate(tokens):
                moves.setdefault(token, []).append((states + at - 1 if at else 0, states + at))
            states += len(tokens)
            ends.add(states - 1)
    return built(states, sorted(ends), ((token, tuple(own)) for token, own in moves.items()), len(texts), end_tokens)


def fewest_tokens(automaton: Automaton) -> np.ndarray:
    """[states] how few tokens lead to each; a large number where none do"""
    fewest = np.full(automaton.states, 1 << 30)
    fewest[0] = 0
    start, end, _ = automaton.writing
    while True:
        better = fewest.copy()
        np.minimum.at(better, end, fewest[start] + 1)
        if (better == fewest).all():
            return fewest
        fewest = better
