"""LLaDA's Monte-Carlo bound of log p(continuation | context): which tokens are masked, and what a draw counts.

https://arxiv.org/abs/2502.09992, get_log_likelihood.py of ML-GSAI/LLaDA. A draw
masks l of L tokens, chosen at random, and counts L / l times the sum of their
log-probabilities given the others. In a batch of draws the l are spread evenly
over 1 to L, from a random one on. With the same seed the draws are those of
its code on a CPU.
"""

from collections import Counter

import torch


def draws(length: int, number: int, batch_size: int, seed: int) -> Counter[tuple[int, ...]]:
    """Ascending indices of the tokens that are masked -> in how many of the draws"""
    generator = torch.Generator().manual_seed(seed)
    drawn: Counter[tuple[int, ...]] = Counter()
    for _ in range(number // batch_size):
        first = float(torch.randint(1, length + 1, (), generator=generator))
        last = first + (batch_size - 1) * (length / batch_size)
        spread = torch.linspace(first, last, steps=batch_size).round().long()
        for count in ((spread - 1) % length + 1).tolist():
            order = torch.randperm(length, generator=generator)
            drawn[tuple((order < count).nonzero().squeeze(1).tolist())] += 1
    return drawn
