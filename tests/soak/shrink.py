"""Makes a failing batch small: fewer requests, then fewer of their fields, as long as it fails in the same way."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.soak.batch import Batch, Entry


def shrink(batch: Batch, fails: Callable[[Batch], bool], seconds: float = 60) -> Batch:
    """Every accepted batch was seen to fail; the time only bounds how small it gets."""
    end = time.monotonic() + seconds
    smaller = True
    while smaller:
        smaller = False
        for candidate in candidates(batch):
            if time.monotonic() > end:
                return batch
            if fails(candidate):
                batch, smaller = candidate, True
                break
    return batch


def candidates(batch: Batch) -> Iterator[Batch]:
    """From the greatest cut to the smallest."""
    entries = batch.entries
    size = len(entries) // 2
    while size:
        for start in range(0, len(entries), size):
            rest = entries[:start] + entries[start + size :]
            if rest:
                yield replace(batch, entries=rest)
        size //= 2
    for reset in batch.resets:
        yield replace(batch, resets=tuple(r for r in batch.resets if r != reset))
    for index, entry in enumerate(entries):
        for smaller in simpler(entry):
            yield replace(batch, entries=(*entries[:index], smaller, *entries[index + 1 :]))


def simpler(entry: Entry) -> Iterator[Entry]:
    given = entry.given
    if entry.arrives:
        yield replace(entry, arrives=0)
    if entry.leaves is not None:
        yield replace(entry, leaves=None)
    extra = given.fields["extra_args"]
    for key in extra:
        rest = {k: v for k, v in extra.items() if k != key}
        yield replace(entry, given=replace(given, fields=given.fields | {"extra_args": rest}))
    for key in given.fields.keys() - {
        "extra_args",
        "max_tokens",
        "temperature",
        "seed",
    }:  # no seed: never twice the same
        rest = {k: v for k, v in given.fields.items() if k != key}
        yield replace(entry, given=replace(given, fields=rest))
    if given.fields["temperature"]:
        yield replace(entry, given=replace(given, fields=given.fields | {"temperature": 0}))
    length = given.fields.get("max_tokens") or 64
    for fewer in sorted({1, length // 2, length - 1} - {0}):
        if fewer < length or "max_tokens" not in given.fields:
            yield replace(entry, given=replace(given, fields=given.fields | {"max_tokens": fewer}))
    for fewer in sorted({1, len(given.prompt) // 2, len(given.prompt) - 1} - {0}):
        if fewer < len(given.prompt):
            yield replace(entry, given=replace(given, prompt=given.prompt[:fewer]))
