"""Masks of LLaDA's Monte-Carlo bound of log p(continuation | context).

https://arxiv.org/abs/2502.09992, get_log_likelihood.py of ML-GSAI/LLaDA. A draw
masks l of L tokens, chosen at random, and contributes L / l times the sum of
their log-probabilities given the others. In a batch of draws, the values of l
are spread evenly over 1 to L with a random offset. With the same seed, the draws
equal those of the official code on a CPU.
"""

from collections.abc import Iterator

import numpy as np
import torch


def draws(length: int, number: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Ascending indices of the masked tokens of each draw [l]. Draws are made on demand, because 16,384 draws of a long
    continuation would take gigabytes."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number // batch_size):
        first = float(torch.randint(1, length + 1, (), generator=generator))
        last = first + (batch_size - 1) * (length / batch_size)
        spread = torch.linspace(first, last, steps=batch_size).round().long()
        for count in ((spread - 1) % length + 1).tolist():
            order = torch.randperm(length, generator=generator)
            yield (order < count).nonzero().squeeze(1).numpy()
