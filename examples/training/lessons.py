"""Recall prompts of one length as a data set: each sample a pure function of (seed, index)."""

import numpy as np
import torch

from examples.demo.tasks import Filler, Sample, recall

#: shares to hide are drawn from here up: LLaDA's 1 / t explodes near 0
LEAST_HIDDEN = 0.05


class Recall(torch.utils.data.Dataset):
    """`needles` codes in a prompt of exactly `length` tokens, one of them asked for."""

    def __init__(self, seed: int, count: int, length: int = 512, needles: int = 4):
        self.seed, self.count, self.length, self.needles = seed, count, length, needles
        self.filler = Filler(seed, sentences=5_000)

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> Sample:
        return recall(np.random.default_rng([self.seed, index]), self.filler, self.length, self.needles)

    def __getitem__(self, index: int) -> dict:
        raise NotImplementedError


class HiddenAnswers(Recall):
    def __getitem__(self, index: int) -> dict:
        sample = self.sample(index)
        t = np.random.default_rng([self.seed, index, 1]).uniform(LEAST_HIDDEN, 1.0)
        return {"prompt": sample.prompt_ids, "answer": sample.answer_ids, "t": t, "seed": index}


class NextTokens(Recall):
    def __getitem__(self, index: int) -> dict:
        sample = self.sample(index)
        prompt = len(sample.prompt_ids)
        return {
            "input_ids": sample.prompt_ids + sample.answer_ids,
            "labels": [-100] * prompt + sample.answer_ids,
            "prompt_mask": [True] * prompt + [False] * len(sample.answer_ids),
        }
