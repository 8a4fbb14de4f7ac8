"""Builds the automata of a template's holes from the texts of the vocabulary's tokens."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_dlm.canvas.automaton import NEVER, Automaton

Pairs = tuple[tuple[int, int], ...]  # transitions of a token, (from state, to state)
#: contents of a JSON string without incomplete escapes, so that any sequence of matches is valid
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


def built(
    states: int,
    starts: Iterable[int],
    ends: Iterable[int],
    pairs_of: Iterable[tuple[Sequence[int], Pairs]],
    size: int,
    end_tokens: Iterable[int],
) -> Automaton:
    """`pairs_of`: tokens and their transitions. Adds the state of a hole that has ended."""
    classes, edges = np.full(size, NEVER, np.int32), list[tuple[int, int, int]]()
    known: dict[Pairs, int] = {}
    for tokens, pairs in pairs_of:
        if pairs not in known:
            known[pairs] = len(known)
            edges += [(start, end, known[pairs]) for start, end in pairs]
        classes[list(tokens)] = known[pairs]
    assert all(start <= end for start, end, _ in edges), "no token leads to a lower state"
    return _with_end(states, starts, ends, edges, classes, len(known), end_tokens)


def _with_end(
    states: int,
    starts: Iterable[int],
    ends: Iterable[int],
    edges: list[tuple[int, int, int]],
    classes: np.ndarray,
    end_class: int,
    end_tokens: Iterable[int],
) -> Automaton:
    """Adds the end class to `classes` [V], and its state"""
    classes[list(end_tokens)] = end_class
    ends = (*ends, states)
    table = np.array([*edges, *((state, states, end_class) for state in ends)], np.int32).T.copy()
    usual = int(np.bincount(classes - NEVER).argmax()) + NEVER
    tokens = np.flatnonzero(classes != usual).astype(np.int32)
    return Automaton(states + 1, tuple(starts), ends, table, len(classes), usual, tokens, classes[tokens])


def _any_of(written: np.ndarray, end_tokens: Iterable[int]) -> Automaton:
    """Any number of the tokens marked in `written`, [V] bool"""
    return _with_end(1, [0], [0], [(0, 0, 0)], np.where(written, 0, NEVER).astype(np.int32), 1, end_tokens)


def free(size: int, end_tokens: Sequence[int], mask_id: int) -> Automaton:
    return _any_of(np.arange(size) != mask_id, end_tokens)


def string(texts: Sequence[str | None], end_tokens: Sequence[int]) -> Automaton:
    """`texts`: text of each token; None for tokens without text or with incomplete characters"""
    return _any_of(np.array([bool(text and STRING.fullmatch(text)) for text in texts]), end_tokens)


def number(texts: Sequence[str | None], end_tokens: Sequence[int]) -> Automaton:
    pairs_of = []
    for token, text in enumerate(texts):
        if text and NUMERIC.fullmatch(text):
            pairs = tuple((state, end) for state in range(len(NUMBER)) if (end := _read(state, text)) is not None)
            if pairs:
                pairs_of.append(([token], pairs))
    return built(len(NUMBER), [0], NUMBER_ENDS, pairs_of, len(texts), end_tokens)


def _read(state: int, text: str) -> int | None:
    for char in text:
        kinds = {"e": "e", "E": "e", "+": "s", "-": "s-", "0": "0d", ".": "."}.get(char, "nd")
        states = [NUMBER[state][kind] for kind in kinds if kind in NUMBER[state]]
        if not states:
            return None
        state = states[0]
    return state


class TokenTexts:
    """Index of tokens by text, and of the lengths of tokens by their first characters."""

    def __init__(self, texts: Sequence[str | None]):
        self.texts = texts
        self.ids_of: dict[str, list[int]] = {}
        for token, text in enumerate(texts):
            if text:
                self.ids_of.setdefault(text, []).append(token)
        lengths: dict[str, set[int]] = {}
        for text in self.ids_of:
            lengths.setdefault(text[:2], set()).add(len(text))
        self._lengths = {start: tuple(sorted(found)) for start, found in lengths.items()}

    def ends(self, text: str, at: int) -> Iterable[int]:
        """Ends of all tokens that match the text from `at` on"""
        for start in {text[at : at + 1], text[at : at + 2]}:
            for length in self._lengths.get(start, ()):
                if at + length <= len(text) and text[at : at + length] in self.ids_of:
                    yield at + length


@dataclass(frozen=True)
class Alternatives:
    """The automaton of a hole for one of several texts, and the minimum number of tokens of each text"""

    automaton: Automaton
    fewest: tuple[int | None, ...]  # None: no sequence of tokens has this text


def one_of(
    alternatives: Sequence[str], texts: TokenTexts, tokenized: Callable[[str], list[int]], end_tokens: Sequence[int]
) -> Alternatives:
    """Each alternative is a path of its characters. If the tokenizer splits a character of an alternative, its tokens
    form another path."""
    pairs_of: dict[str | int, list[tuple[int, int]]] = {}  # key: a text, or a token without a text
    starts, ends, fewest, states = list[int](), list[int](), list[int | None](), 0
    for alternative in alternatives:
        starts.append(states)
        reached = {0: 0}  # number of characters -> minimum number of tokens
        for at in range(len(alternative)):
            for end in texts.ends(alternative, at):
                pairs_of.setdefault(alternative[at:end], []).append((states + at, states + end))
                if at in reached:
                    reached[end] = min(reached.get(end, end), reached[at] + 1)
        states += len(alternative) + 1
        ends.append(states - 1)
        least = reached.get(len(alternative))
        tokens = tokenized(alternative)
        if any(texts.texts[token] is None for token in tokens):
            starts.append(states)
            for at, token in enumerate(tokens):
                of = texts.texts[token] or token
                pairs_of.setdefault(of, []).append((states + at, states + at + 1))
            states += len(tokens) + 1
            ends.append(states - 1)
            least = len(tokens) if least is None else min(least, len(tokens))
        fewest.append(least)
    found = (([of] if isinstance(of, int) else texts.ids_of[of], tuple(pairs)) for of, pairs in pairs_of.items())
    return Alternatives(built(states, starts, ends, found, len(texts.texts), end_tokens), tuple(fewest))
