"""Automata over tokens that define the valid contents of a template's hole.

A set of states is a Python integer with one bit per state. No token leads to a lower state, so a token moves a set by
shifting it. Tokens with the same transitions form a class. Tokens that end a hole early form a separate class. It leads
from every state in which the hole may end to the last state, which only these tokens leave. Transitions depend on the
text of a token, so a text is accepted regardless of how it is split into tokens.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np

NEVER = -1  # class of tokens that are not allowed in the hole
MASKED = -2  # class of a position without a token


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
