"""Lessons in walking: paths of words, longer and longer, of which most is hidden.

As those of lessons.py a batch is a pure function of (seed, step).
"""

import numpy as np
import torch

from . import tokenizer as tok
from .lessons import Batch
from .tasks import MOST_WALK_WORDS, walk

TOKENS = 2500  # of a batch
FIRST_WORDS, FEWEST_WORDS = 8, 4
GROWN_AT = 360  # steps
PADDING_MOST, PADDING_WEIGHT = 24, 0.1
#: of the rows, hidden as a decoding in canvas blocks meets them: all before some place stands, a few behind it do
BLOCKWISE_SHARE, BLOCK = 0.6, 32
EASY_WEIGHT = 3.0  # of tokens behind two that stand, which is enough to know them
ARROW = tok.encode(">")[0]


class Walks:
    def __init__(self, seed: int):
        self.seed = seed

    def batches(self, step: int) -> list[Batch]:
        """One of the longest paths so far, one of any length up to these"""
        rng = np.random.default_rng([self.seed, step])
        grown = min(1.0, step / GROWN_AT)
        longest = int(FIRST_WORDS + (MOST_WALK_WORDS - FIRST_WORDS) * grown)
        return [
            self._batch(rng, "longest walks", longest),
            self._batch(rng, "walks", int(rng.integers(FEWEST_WORDS, longest + 1))),
        ]

    @staticmethod
    def _batch(rng: np.random.Generator, name: str, words: int) -> Batch:
        padding = int(rng.integers(PADDING_MOST))
        rows = max(2, TOKENS // (6 * words + PADDING_MOST))
        samples = [walk(rng, words) for _ in range(rows)]  # all of one length
        prompts = np.array([sample.prompt_ids for sample in samples])
        length = len(samples[0].answer_ids)
        response = np.array([sample.answer_ids + [tok.EOS] * padding for sample in samples])  # [B, R]
        at = np.arange(length + padding)
        masked = rng.random(response.shape) < rng.random((rows, 1))
        first = rng.integers(length, size=(rows, 1))
        block = ((at >= first) & masked) | (at >= first + BLOCK) | (at == first)
        masked = np.where(rng.random((rows, 1)) < BLOCKWISE_SHARE, block, masked)
        stands = np.concatenate([np.ones((rows, 2), bool), ~masked], 1)
        easy = stands[:, :-2] & stands[:, 1:-1] & (at < length)
        weights = np.where(easy, EASY_WEIGHT, np.where(at < length, 1.0, PADDING_WEIGHT))[masked]
        taken = [torch.from_numpy(array) for array in (masked, response[masked])]
        return Batch(
            name,
            length + padding,
            torch.from_numpy(np.concatenate([prompts, np.where(masked, tok.MASK, response)], 1)),
            *taken,
            torch.from_numpy(weights / weights.sum() / 2).float(),
            torch.from_numpy((easy & (response != ARROW))[masked]),
        )
