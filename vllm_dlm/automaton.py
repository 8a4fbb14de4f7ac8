"""Automata over tokens that define the valid contents of a template's hole.

A set of states is a Python integer with one bit per state. No token leads to a lower state, so a token moves a set by
shifting it. Tokens with the same transitions form a class. Tokens that end a hole early form a separate class. It leads
from every state in which the hole may end to the last state, which only these tokens leave. Transitions depend on the
text of a token, so a text is accepted regardless of how it is split into tokens.
"""

import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np

Pairs = tuple[tuple[int, int], ...]  # transitions of a token, (from state, to state)
NEVER = -1  # class of tokens that are not allowed in the hole
MASKED = -2  # class of a position without a token
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


@dataclass(frozen=True, eq=False)
class Automaton:
    states: int  # number of states; the last state is that of a hole that has ended
    starts: tuple[int, ...]
    ends: tuple[int, ...]  # states in which a hole may end
    edges: np.ndarray  # [3, E] int32: from state, to state, token class; classes ascend
    size: int  # size of the vocabulary
    usual: int  # class of all tokens that are not in `tokens`
    tokens: np.ndarray  # [T] int32, ascending
    own: np.ndarray  # [T] int32, classes of `tokens`

    def classes_of(self, tokens: np.ndarray) -> np.ndarray:
        if not len(self.tokens):
            return np.full(len(tokens), self.usual, np.int32)
        at = np.searchsorted(self.tokens, tokens).clip(max=len(self.tokens) - 1)
        return np.where(self.tokens[at] == tokens, self.own[at], self.usual)

    # -- sets of states ------------------------------------------------------------------------

    @cached_property
    def end_class(self) -> int:
        return int(self.edges[2, -1])

    @cached_property
    def starting(self) -> int:
        return _bits(self.starts)

    @cached_property
    def ending(self) -> int:
        return _bits(self.ends)

    @cached_property
    def ended(self) -> int:
        return 1 << (self.states - 1)

    @cached_property
    def _known(self) -> dict[int, tuple[tuple[int, int], ...]]:
        return {}

    def moves(self, of: int) -> tuple[tuple[int, int], ...]:
        """Moves of a class, or of all classes except the end class (MASKED): (states, shift)"""
        if of not in self._known:
            first, last = np.searchsorted(self.edges[2], [0, self.end_class] if of == MASKED else [of, of + 1])
            self._known[of] = _moves(*self.edges[:2, first:last])
        return self._known[of]

    def after(self, states: int, of: int) -> int:
        """States reached from `states` by a token of a class"""
        if of == self.end_class:
            return self.ended if states & self.ending else 0
        reached = self.ended if of == MASKED and states & self.ending else 0
        for mask, shift in self.moves(of):
            reached |= (states & mask) << shift
        return reached

    def before(self, states: int, of: int) -> int:
        """States from which a token of a class leads to one of `states`"""
        if of == self.end_class:
            return self.ending if states & self.ended else 0
        left = self.ending if of == MASKED and states & self.ended else 0
        for mask, shift in self.moves(of):
            left |= (states >> shift) & mask
        return left

    # -- tokens allowed at a position ----------------------------------------------------------

    def allowed(self, between: Sequence[tuple[int, int]]) -> np.ndarray:
        """[classes, P] uint8: 1 if the class leads from one of the first states to one of the second states of a
        pair"""
        start, end, of = self.edges
        before, after = (self._by_state([pair[side] for pair in between]) for side in (0, 1))
        firsts = np.flatnonzero(np.diff(of, prepend=-1))
        found = np.bitwise_or.reduceat(before[start] & after[end], firsts)
        return np.unpackbits(found.astype(np.uint8, copy=False), axis=1, count=len(between), bitorder="little")

    def _by_state(self, sets: Sequence[int]) -> np.ndarray:
        """[states, P / 8]: one bit per set, 1 if the set has the state"""
        width = -(-self.states // 8)
        octets = np.frombuffer(b"".join(each.to_bytes(width, "little") for each in sets), np.uint8)
        bits = np.unpackbits(octets.reshape(len(sets), width), axis=1, count=self.states, bitorder="little")
        return np.packbits(bits, axis=0, bitorder="little").T

    def mark(self, rows: np.ndarray, between: Sequence[tuple[int, int]]) -> None:
        """Sets the bits of all allowed tokens (see `allowed`) in `rows`, [P, ceil(size / 32)] int32, initially zero."""
        rows, allowed = rows.view(np.uint32), self.allowed(between)
        if self.usual != NEVER:
            rows[allowed[self.usual] == 1] = self._usual_row
        classes, shifts, words, firsts = self._words
        if len(words):
            bits_TP = allowed[classes].astype(np.uint32) << shifts[:, None]
            bits_PW = np.bitwise_or.reduceat(bits_TP, firsts).T
            rows[:, words] = bits_PW if self.usual == NEVER else rows[:, words] | bits_PW

    @cached_property
    def _usual_row(self) -> np.ndarray:
        bits = np.zeros(-(-self.size // 32) * 32, np.bool_)
        bits[: self.size] = True
        bits[self.tokens] = False
        return np.packbits(bits, bitorder="little").view(np.uint32)

    @cached_property
    def _words(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """For `tokens` that are allowed in the hole: classes, bit offsets, distinct words, first token of each word"""
        tokens, classes = self.tokens[self.own != NEVER], self.own[self.own != NEVER]
        firsts = np.flatnonzero(np.diff(tokens >> 5, prepend=-1))
        return classes, (tokens & 31).astype(np.uint32), tokens[firsts] >> 5, firsts

    # -- plain data for the engine -------------------------------------------------------------

    def plain(self) -> dict:
        """Plain data for the request that is sent to the engine. `key`: digest of the content"""
        others = np.zeros(self.size, np.bool_)
        others[self.tokens] = True
        plain = {
            "states": self.states,
            "starts": list(self.starts),
            "ends": list(self.ends),
            "size": self.size,
            "usual": self.usual,
            "edges": zlib.compress(self.edges.astype(np.int32).tobytes()),
            "tokens": zlib.compress(np.packbits(others).tobytes()),
            "own": zlib.compress(self.own.astype(np.int32).tobytes()),
        }
        return plain | {"key": blake2b(repr(plain).encode(), digest_size=16).hexdigest()}

    @classmethod
    def from_plain(cls, plain: dict) -> "Automaton":
        edges, own = (np.frombuffer(zlib.decompress(plain[name]), np.int32) for name in ("edges", "own"))
        others = np.unpackbits(np.frombuffer(zlib.decompress(plain["tokens"]), np.uint8), count=plain["size"])
        tokens = np.flatnonzero(others).astype(np.int32)
        states, starts, ends = plain["states"], tuple(plain["starts"]), tuple(plain["ends"])
        return cls(states, starts, ends, edges.reshape(3, -1), plain["size"], plain["usual"], tokens, own)


def _bits(states: Iterable[int]) -> int:
    return sum(1 << state for state in set(states))


def _moves(start: np.ndarray, end: np.ndarray) -> tuple[tuple[int, int], ...]:
    shifts = end - start
    return tuple((_bits(start[shifts == shift].tolist()), shift) for shift in np.unique(shifts).tolist())


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
