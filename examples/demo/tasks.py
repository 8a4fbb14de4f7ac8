"""What the demo model is asked: long-prompt recall, and small tasks that build on their own answer.

Every sampler takes a numpy Generator and nothing else that varies, so a seed fixes a prompt.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np

from . import tokenizer as tok
from .tokenizer import ADJECTIVES, LETTERS, NAMES, NOUNS, VERBS, encode

INTRO = encode("Remember the codes.")
CODE_DIGITS = 5
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
WORD_VALUES = NOUNS + ADJECTIVES
ADDEND_LIMIT = 100
WALK_WORDS = NAMES + NOUNS + ADJECTIVES + LETTERS
MOST_WALK_WORDS = 124


@dataclass
class Sample:
    task: str
    prompt_ids: list[int]  # as the chat template gives them
    answer_ids: list[int]  # up to and including the end-of-turn token
    needle_spans: list[tuple[int, int]] = field(default_factory=list)  # only of those asked for


def _sample(task: str, content: str, answer: str) -> Sample:
    return Sample(task, tok.chat(content), [*encode(answer), tok.EOT])


# --- recall ------------------------------------------------------------------------------------


def _filler_sentence(rng: np.random.Generator) -> str:
    kind = rng.integers(10)
    if kind < 6:
        a, b = rng.choice(ADJECTIVES, 2)
        c, d = rng.choice(NOUNS, 2)
        return f" The {a} {c} {rng.choice(VERBS)} the {b} {d}."
    if kind == 6:
        return " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    if kind == 7:  # looks like a needle up to its value
        return f" The color of {rng.choice(NAMES)} is {rng.choice(ADJECTIVES)}."
    if kind == 8:
        near, what = rng.choice(NOUNS, 2)
        return f" The {what} of {rng.choice(NAMES)} is near the {near}."
    return f" {rng.choice(NAMES)} {rng.choice(VERBS)} the {rng.choice(NOUNS)}."


class Filler:
    """A long run of random sentences, from which prompts take windows starting at a sentence."""

    def __init__(self, seed: int, sentences: int = 20_000):
        rng = np.random.default_rng(seed)
        pieces = [encode(_filler_sentence(rng)) for _ in range(sentences)]
        self.ids = np.concatenate(pieces)
        self.starts = np.cumsum([0] + [len(piece) for piece in pieces[:-1]])

    def window(self, rng: np.random.Generator, length: int) -> tuple[list[int], list[int]]:
        """`length` ids and the places in 0..length where a sentence could be put in."""
        last = np.searchsorted(self.starts, len(self.ids) - length, side="left")
        start = self.starts[rng.integers(0, max(1, last))]
        inside = self.starts[np.searchsorted(self.starts, start) : np.searchsorted(self.starts, start + length)]
        places = (inside - start).tolist() or [0]
        return self.ids[start : start + length].tolist(), places


def _code(rng: np.random.Generator) -> str:
    return "".join(map(str, rng.integers(0, 10, CODE_DIGITS)))


def _joined(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def recall(
    rng: np.random.Generator,
    filler: Filler,
    length: int,
    needles: int = 1,
    queried: int = 1,
    depth: float | None = None,
    omit: bool = False,
) -> Sample:
    """A prompt of exactly `length` tokens hiding `needles` codes, `queried` of them asked for.

    `depth` puts the first queried needle at that fraction of the filler; `omit` leaves the
    queried needles out (filler takes their place), so that nothing but chance can answer.
    """
    names = [str(name) for name in rng.choice(NAMES, needles, replace=False)]
    codes = [_code(rng) for _ in names]
    plural = "What are the codes of" if queried > 1 else "What is the code of"
    question = encode(f"\n{plural} {_joined(names[:queried])}?")
    sentences = [encode(f" The code of {n} is {c}.") for n, c in zip(names, codes, strict=False)]
    hidden = range(queried if omit else 0, needles)
    room = (
        length
        - len(tok.CHAT_PREFIX)
        - len(INTRO)
        - len(question)
        - len(tok.CHAT_SUFFIX)
        - sum(len(sentences[i]) for i in hidden)
    )
    if room < 0:
        raise ValueError(f"{needles} needles do not fit into {length} tokens")
    text, places = filler.window(rng, room)
    chosen = {i: places[rng.integers(len(places))] for i in hidden}
    if depth is not None and not omit:
        chosen[0] = min([*places, room], key=lambda place: abs(place - depth * room))
    # Needles that share a place stand in random order, but depths 0 and 1 mean the very ends.
    tie = {i: rng.random() for i in hidden}
    if depth in (0.0, 1.0) and 0 in tie:
        tie[0] = 2 * depth - 0.5
    ids, spans, taken = tok.CHAT_PREFIX + INTRO, {}, 0
    for i in sorted(hidden, key=lambda i: (chosen[i], tie[i])):
        ids = ids + text[taken : chosen[i]]
        taken = chosen[i]
        spans[i] = (len(ids), len(ids) + len(sentences[i]))
        ids = ids + sentences[i]
    ids = ids + text[taken:] + question + tok.CHAT_SUFFIX
    answer = ",".join(f" {n} is {c}" for n, c in zip(names[:queried], codes, strict=False)) + "."
    return Sample("recall", ids, [*encode(answer), tok.EOT], [spans[i] for i in range(queried) if i in spans])


def recite(rng: np.random.Generator, pairs: int, value: str) -> Sample:
    """A list of name-value pairs to be repeated in another order: the densest recall lesson."""
    names = [str(name) for name in rng.choice(NAMES, pairs, replace=False)]
    if value == "word":
        values = [f"the {word}" for word in rng.choice(WORD_VALUES, pairs)]
    else:
        values = ["".join(map(str, rng.integers(0, 10, int(value)))) for _ in names]
    listed = "".join(f" {n} is {v}." for n, v in zip(names, values, strict=False))
    order = rng.permutation(pairs)
    answer = ",".join(f" {names[i]} is {values[i]}" for i in order) + "."
    return _sample("recite", f"Remember the codes.{listed}\nTell me the codes.", answer)


# --- small tasks -------------------------------------------------------------------------------


def _spaced(items) -> str:
    return "".join(f" {item}" for item in items)


def copy(rng: np.random.Generator) -> Sample:
    letters = rng.choice(LETTERS, rng.integers(2, 7))
    return _sample("copy", "Copy:" + _spaced(letters), _spaced(letters))


def reverse(rng: np.random.Generator) -> Sample:
    letters = rng.choice(LETTERS, rng.integers(2, 7))
    return _sample("reverse", "Reverse:" + _spaced(letters), _spaced(letters[::-1]))


def sort(rng: np.random.Generator) -> Sample:
    letters = rng.choice(LETTERS, rng.integers(2, 7), replace=False)
    return _sample("sort", "Sort:" + _spaced(letters), _spaced(sorted(letters)))


def add(rng: np.random.Generator) -> Sample:
    a, b = rng.integers(0, ADDEND_LIMIT, 2)
    return _sample("add", f"Add {a} + {b}", str(a + b))


def totals(rng: np.random.Generator) -> Sample:
    """Each total needs the one before it: the answer cannot be filled in any order."""
    numbers = rng.integers(1, 10, rng.integers(2, 6))
    return _sample("totals", "Total:" + _spaced(numbers), _spaced(np.cumsum(numbers)))


def follow(rng: np.random.Generator) -> Sample:
    """Walk a shuffled chain of arrows from its start: each letter is found by the one before."""
    chain = [str(letter) for letter in rng.choice(LETTERS, rng.integers(3, 7), replace=False)]
    arrows = [f" {a} {b}," for a, b in itertools.pairwise(chain)]
    rng.shuffle(arrows)
    return _sample("follow", f"Follow{''.join(arrows)} from {chain[0]}", _spaced(chain))


def walk(rng: np.random.Generator, words: int) -> Sample:
    """`follow` at length: every word of the answer is found in the prompt by the one before, and by nothing else."""
    path = [str(word) for word in rng.choice(WALK_WORDS, words, replace=False)]
    arrows = [f" {a}> {b};" for a, b in itertools.pairwise(path)] + [f" {path[-1]}>.;"]
    rng.shuffle(arrows)
    return _sample("walk", f"Follow{''.join(arrows)} from {path[0]}", "".join(f" {word}>" for word in path) + ".")


def words_of(answer: int) -> int:
    """Words of the longest walk whose answer has at most so many tokens"""
    return min((answer - 2) // 2, MOST_WALK_WORDS)


SMALL_TASKS = {"copy": copy, "reverse": reverse, "sort": sort, "add": add, "totals": totals, "follow": follow}
