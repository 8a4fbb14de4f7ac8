"""Which cases of a test `make test` runs. The rest are marked `slow` and run in `make test-slow`."""

from collections.abc import Callable, Iterable
from itertools import combinations, product

import pytest


def slow(*values) -> list:
    """Cases for `make test-slow`; a tuple is a case of several parameters."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow) for value in values
    ]


def in_turn(first: list, second: list, most: int | None = None) -> list:
    """Each of the second, or the first ones of them, with one of the first in turn; the other pairs are slow."""
    kept = [(first[index % len(first)], value) for index, value in enumerate(second)][:most]
    return [*kept, *slow(*(pair for pair in product(first, second) if pair not in kept))]


def pairwise(*axes: list) -> list:
    """Cases of several parameters in which each value meets each value of every other one; the rest are slow."""
    cases = list(product(*(range(len(axis)) for axis in axes)))
    pairs = {case: set(combinations(enumerate(case), 2)) for case in cases}
    left, kept = set().union(*pairs.values()), set()
    while left:
        best = max(cases, key=lambda case: len(pairs[case] & left))
        left -= pairs[best]
        kept.add(best)
    made = {case: tuple(axis[index] for axis, index in zip(axes, case, strict=True)) for case in cases}
    return [value for case, own in made.items() for value in ([own] if case in kept else slow(own))]


def first_of_each(kind: Callable, cases: Iterable[tuple[str, object]]) -> list:
    """Cases (name, value), of which the first one of each kind is not slow."""
    seen, made = set(), []
    for name, value in cases:
        marks = [pytest.mark.slow] if kind(value) in seen else []
        made.append(pytest.param(value, id=name, marks=marks))
        seen.add(kind(value))
    return made
