"""Long answers whose tokens depend on each other, and the lessons that teach them.

Every item of an answer needs the one before it, so nobody can fill many positions at once by guessing each alone:
these are what decodings are compared on. The checkpoint starts as the demo's, whose lookups they build on.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch

from . import tokenizer as tok
from .lessons import Batch
from .tasks import Sample, _sample, _spaced
from .tokenizer import ADJECTIVES, LETTERS, NAMES, NOUNS, VERBS

WORDS = NAMES + ADJECTIVES + NOUNS + VERBS
MOST_ITEMS = 120
MODULUS = 4
#: (last step, most items until then)
SIZES = [(200, 8), (350, 16), (500, 32), (650, 64), (float("inf"), MOST_ITEMS)]
BLOCKS = (8, 16, 32)


def ledger(rng: np.random.Generator, items: int) -> Sample:
    """Running totals modulo 4, each beside its name: the number that stands there is added to the total before."""
    names = rng.choice(WORDS, items, replace=False)
    numbers = rng.integers(0, MODULUS, items)
    totals = np.cumsum(numbers) % MODULUS
    asked, answer = ("".join(f" {n} {d}" for n, d in zip(names, each, strict=True)) for each in (numbers, totals))
    return _sample("ledger", "Total:" + asked, answer)


def chain(rng: np.random.Generator, items: int) -> Sample:
    """Arrows between words in any order, to be walked from a start."""
    words = [str(word) for word in rng.choice(WORDS, items, replace=False)]
    arrows = [f" {a} {b}," for a, b in itertools.pairwise(words)]
    rng.shuffle(arrows)
    return _sample("chain", f"Follow{''.join(arrows)} from {words[0]}", _spaced(words))


def order(rng: np.random.Generator, items: int) -> Sample:
    """Letters to be sorted."""
    letters = rng.choice(LETTERS, items, replace=False)
    return _sample("order", "Sort:" + _spaced(letters), _spaced(sorted(letters)))


PUZZLES = {"ledger": ledger, "chain": chain, "order": order}
#: items of a puzzle
MOST = {"ledger": 80, "chain": MOST_ITEMS, "order": len(LETTERS)}


class PuzzleLessons:
    """Batches as a pure function of (seed, step), as Lessons are."""

    def __init__(self, seed: int, recall_tokens: int, small_tokens: int):
        self.seed, self.tokens = seed, (recall_tokens, small_tokens)

    def batches(self, step: int) -> list[Batch]:
        rng = np.random.default_rng([self.seed, 1, step])
        names = "ledger", "order" if step % 3 == 2 else "chain"
        return [self._batch(rng, name, step, tokens) for name, tokens in zip(names, self.tokens, strict=True)]

    def _batch(self, rng, name: str, step: int, tokens: int) -> Batch:
        """Of about equally many items: half of the batches as many as there may be, in the others any number."""
        most = min(next(size for end, size in SIZES if step < end), MOST[name])
        most = most if rng.random() < 0.5 else round(float(np.exp(rng.uniform(np.log(4), np.log(most)))))
        samples, spent = [], 0
        while spent < tokens:
            samples.append(PUZZLES[name](rng, int(rng.integers(max(2, most // 2), most + 1))))
            spent += len(samples[-1].prompt_ids) + len(samples[-1].answer_ids)
        return masked(rng, name, samples)


def masked(rng, name: str, samples: list[Sample]) -> Batch:
    """Half of the rows as a semi-autoregressive decoding meets them: all before a block stands, nothing behind it,
    and of the block some. The others are LLaDA's: every position masked with one probability."""
    rows = len(samples)
    room = int(rng.choice([1, 8, 32]))
    width = max(len(s.prompt_ids) + len(s.answer_ids) + room for s in samples)
    ids = np.full((rows, width), tok.EOS)
    places = np.arange(width)[None]
    starts = np.array([[len(s.prompt_ids)] for s in samples])
    ends = starts + np.array([[len(s.answer_ids)] for s in samples])
    for row, s in zip(ids, samples, strict=True):
        row[: len(s.prompt_ids + s.answer_ids)] = s.prompt_ids + s.answer_ids
    response = places >= starts
    rate = rng.uniform(0.05, 1.0, (rows, 1))
    hidden = (rng.random((rows, width)) < rate) & response
    block = rng.choice(BLOCKS, (rows, 1))
    begin = starts + (rng.random((rows, 1)) * (ends - starts) / block).astype(int) * block
    inside = (places >= begin) & (places < begin + block)
    in_blocks = rng.random((rows, 1)) < 0.5
    hidden = np.where(in_blocks, (inside & hidden) | (places >= begin + block), hidden)
    counted = hidden & (inside | ~in_blocks)
    weights = np.where(places < ends, 1.0, 0.1) * counted
    weights /= np.maximum(weights.sum(1, keepdims=True), 1.0) * rows
    tail = int(width - starts.min())
    counted_BR = counted[:, -tail:]
    # the first mask of each row: with what is before it, one token is always to be known
    first = counted & (counted.cumsum(1) == 1) & (places < ends)

    def take(array, dtype):
        return torch.from_numpy(np.broadcast_to(array, ids.shape)[:, -tail:][counted_BR]).to(dtype)

    return Batch(
        name, tail, torch.from_numpy(np.where(hidden, tok.MASK, ids)), torch.from_numpy(counted_BR),
        take(ids, torch.int64), take(weights, torch.float32), take(first, torch.bool),
    )  # fmt: skip
