"""What is learned when: batches as a pure function of (seed, step).

Nothing here looks at the clock or at the accuracy so far, so the same seed gives the same lessons
on any machine, and training can stop and go on at any step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import tokenizer as tok
from .tasks import SMALL_TASKS, WORD_VALUES, Filler, Sample, recall, recite

# (first step, longest prompt from then on); before the first entry there is only recitation
LENGTHS = [(288, 64), (384, 96), (480, 128), (624, 192), (768, 256), (850, 384), (950, 512), (1080, 768), (1250, 1024)]
# (last step, what holds until then)
END = float("inf")
RECITED = [(72, ["word"]), (144, ["word", "1", "2"]), (END, ["word", "2", "5"])]
RECITE_SHARE = [(288, 1.0), (768, 0.5), (END, 0.08)]
SMALL_SHARES = [
    (850, {"copy": 0.07, "reverse": 0.07, "sort": 0.24, "add": 0.32, "totals": 0.22, "follow": 0.08}),
    (1450, {"copy": 0.05, "reverse": 0.09, "sort": 0.18, "add": 0.28, "totals": 0.30, "follow": 0.10}),
    (END, {"copy": 0.04, "reverse": 0.07, "sort": 0.20, "add": 0.32, "totals": 0.33, "follow": 0.04}),
]
MOST_NEEDLES, MOST_QUERIED = 16, 4
TOKENS_PER_NEEDLE = 14
PADDING_WEIGHT = 0.1
FULLY_MASKED_SHARE = 0.25
VALUES_ONLY_SHARE = 0.33

VALUE_IDS = np.array(tok.DIGIT_IDS + [tok.encode(" " + word)[0] for word in WORD_VALUES])


@dataclass
class Batch:
    name: str
    tail: int  # trailing positions that can hold masks
    ids_BT: Tensor
    masked_BR: Tensor  # over the tail
    labels_N: Tensor
    weights_N: Tensor
    graded_N: Tensor  # first-step predictions of real answer tokens, for the progress line


def _until(table, step: int):
    return next(value for end, value in table if step < end)


class Lessons:
    def __init__(self, seed: int, recall_tokens: int, small_tokens: int):
        self.seed = seed
        self.recall_tokens, self.small_tokens = recall_tokens, small_tokens
        self.filler = Filler(seed)

    def batches(self, step: int) -> list[Batch]:
        rng = np.random.default_rng([self.seed, step])
        long = self._recital(rng, step) if rng.random() < _until(RECITE_SHARE, step) else self._recall(rng, step)
        return [long, self._small(rng, step)]

    def _recital(self, rng, step: int) -> Batch:
        pairs = int(rng.integers(6, 13))
        value = str(rng.choice(_until(RECITED, step)))
        first = recite(rng, pairs, value)
        rows = max(8, self.recall_tokens // (len(first.prompt_ids) + len(first.answer_ids)))
        samples = [first] + [recite(rng, pairs, value) for _ in range(rows - 1)]
        return self._masked(rng, "recite " + value, samples, canvas=1, values_only=1.0)

    def _recall(self, rng, step: int) -> Batch:
        open_lengths = [length for start, length in LENGTHS if step >= start]
        length = open_lengths[-1] if rng.random() < 0.5 else int(rng.choice(open_lengths))
        canvas = int(rng.choice([8, 16, 24, 32, 48]))
        samples = []
        for _ in range(max(2, self.recall_tokens // (length + 24))):
            most = max(1, min(MOST_NEEDLES, (length - 32) // TOKENS_PER_NEEDLE))
            needles = most if rng.random() < 0.5 else int(rng.integers(1, most + 1))
            several = needles > 1 and length >= 96 and rng.random() < 0.5
            queried = int(rng.integers(2, min(MOST_QUERIED, needles) + 1)) if several else 1
            depth = float(rng.integers(2)) if rng.random() < 0.15 else None  # the very ends
            samples.append(recall(rng, self.filler, length, needles, queried, depth))
        return self._masked(rng, f"recall {length}", samples, canvas, VALUES_ONLY_SHARE)

    def _small(self, rng, step: int) -> Batch:
        canvas = int(rng.choice([4, 8, 16, 32], p=[0.4, 0.35, 0.2, 0.05]))
        samples, spent = [], 0
        tasks, shares = zip(*_until(SMALL_SHARES, step).items(), strict=False)
        while spent < self.small_tokens:
            sample = SMALL_TASKS[str(rng.choice(tasks, p=shares))](rng)
            spent += len(sample.prompt_ids) + max(canvas, len(sample.answer_ids) + 1)
            samples.append(sample)
        return self._masked(rng, "small", samples, canvas, values_only=0.0)

    @staticmethod
    def _masked(rng, name: str, samples: list[Sample], canvas: int, values_only: float) -> Batch:
        """LLaDA's SFT loss: mask the answer with probability t, weigh by 1/t, padding by less."""
        rows = len(samples)
        width = max(len(s.prompt_ids) + max(canvas, len(s.answer_ids) + 1) for s in samples)
        ids = np.full((rows, width), tok.EOS)
        starts = np.array([[len(s.prompt_ids)] for s in samples])
        ends = starts + np.array([[len(s.answer_ids)] for s in samples])
        for row, s in zip(ids, samples, strict=False):
            row[: len(s.prompt_ids + s.answer_ids)] = s.prompt_ids + s.answer_ids
        places = np.arange(width)[None]
        response = places >= starts

        rate = rng.uniform(0.1, 1.0, (rows, 1))
        rate[rng.random((rows, 1)) < FULLY_MASKED_SHARE] = 1.0
        masked = (rng.random((rows, width)) < rate) & response
        # Some rows hide only the values: with the names standing, the lookup is the whole lesson.
        only = rng.random((rows, 1)) < values_only
        masked = np.where(only, response & np.isin(ids, VALUE_IDS), masked)
        rate = np.where(only, 1.0, rate)

        weights = np.where(places < ends, 1.0, PADDING_WEIGHT)
        total = masked.sum() if values_only == 1.0 else (weights * response).sum()
        graded = (places < ends) & ((rate == 1.0) if values_only == 0.0 else only)
        tail = int(width - starts.min())
        masked_BR = masked[:, -tail:]

        def take(array, dtype):
            chosen = np.broadcast_to(array, ids.shape)[:, -tail:][masked_BR]
            return torch.from_numpy(chosen).to(dtype)

        return Batch(
            name,
            tail,
            torch.from_numpy(np.where(masked, tok.MASK, ids)),
            torch.from_numpy(masked_BR),
            take(ids, torch.int64),
            take(weights / rate / total, torch.float32),
            take(graded, torch.bool),
        )
