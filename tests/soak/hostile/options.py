"""Rows of request options, from the registered methods: each option at its largest value, one above, and absurd.

The largest value is found by asking `request_options`, so a new field of a decoding joins by being there.
"""

import math
import struct
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from tests.soak.hostile.rows import ANSWERED, AT_ONCE, LEGAL, REFUSED, Row, Target, completion, with_options
from tests.soak.requests import names
from vllm_dlm.methods import methods
from vllm_dlm.options import METHOD_KEYS, REQUEST_FIELDS, WINDOW, OptionError, Options, request_options
from vllm_dlm.options.types import LARGEST

#: other options without which some fields accept no value
COMPANIONS: tuple[dict, ...] = ({}, {"dlm_threshold": 1.0}, {"dlm_threshold": "none"})
#: values of any number that may be legal, to begin a search with
STARTS = (0.5, 1, 0, 2, 16)


@dataclass(frozen=True)
class Range:
    """Values of an option, with the other options that it needs."""

    largest: Any
    above: Any
    absurd: Any
    others: dict


def rows(target: Target) -> Iterator[Row]:
    for key, (name, cls, field) in decoding_fields().items():
        found = range_of(target.server, name, cls, field, target.large)
        if field == "steps":  # the front-end refuses more steps than the longest canvas has positions
            found = Range(target.max_model_len, target.max_model_len + 1, found.absurd, found.others)
        yield from _three("option", key, found)
    for key, kind in METHOD_KEYS.items():
        longest = max(names(kind), key=len)
        algorithm = {"dlm_threshold": "none"} if kind == "decoding" else {}
        yield from _three("option", key, Range(longest, f"{longest}x", "x" * target.large, algorithm), ANSWERED)
    for key in REQUEST_FIELDS:
        stream = {"stream": True} if key == "dlm_frames" else {}
        legal = LEGAL if key != "dlm_watch" or target.view else REFUSED
        yield from _three("option", key, Range(1, 2, [1] * (target.large // 4), {}), legal, **stream)
    largest = LARGEST - 1
    yield from _three("option", WINDOW, Range(largest, LARGEST, math.inf, {"dlm_extent": "window"}))
    yield from presets()
    yield from varied()


def _three(kind: str, key: str, found: Range, legal: frozenset = LEGAL, **fields) -> Iterator[Row]:
    def option(value: Any):
        return with_options({**found.others, key: value}, **fields)

    yield Row(kind, f"{key}, largest", option(found.largest), legal)
    yield Row(kind, f"{key}, one above", option(found.above), REFUSED)
    like = {str: "text", list: "ids"}.get(type(found.absurd), "")
    yield Row(kind, f"{key}, absurd", option(found.absurd), REFUSED, like=like)


def decoding_fields() -> dict[str, tuple[str, type, str]]:
    """Request option -> (decoding, its class, its field): each field once, with the first decoding that has it"""
    found: dict[str, tuple[str, type, str]] = {}
    for name, cls in sorted(methods("decoding").items()):
        for field in fields(cls):
            found.setdefault(f"dlm_{field.name}", (name, cls, field.name))
    return found


def range_of(server: Options, decoding: str, cls: type, field: str, large: int) -> Range:
    hint = _number_of(typing.get_type_hints(cls)[field])
    key = f"dlm_{field}"
    if hint is bool:
        return Range(1, 2, "yes" * (large // 3), {"dlm_decoding": decoding})
    if hint not in (int, float):
        return Range(getattr(cls, field), "x", "x" * large, {"dlm_decoding": decoding})
    found = [_searched(server, key, hint, {"dlm_decoding": decoding, **others}) for others in COMPANIONS]
    legal = [each for each in found if each is not None]
    if not legal:
        raise ValueError(f"{key}: no legal value was found; give it a companion")
    return max(legal, key=lambda each: each.largest)  # the first of equal ones


def _searched(server: Options, key: str, kind: type, others: dict) -> Range | None:
    others = {name: value for name, value in others.items() if name != key}

    def legal(value: Any) -> bool:
        return accepted(server, {**others, key: value})

    starts = [value for value in STARTS if (kind is float or isinstance(value, int)) and legal(value)]
    if not starts:
        return None
    largest = _largest(legal, max(starts), kind)
    above = largest + 1 if kind is int else math.nextafter(largest, math.inf)
    return Range(largest, above, 10**4000 if kind is int else math.nan, others)


def _number_of(hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        (hint,) = (kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    return hint


def _largest(legal: Callable[[Any], bool], start: float, kind: type) -> Any:
    """The largest value that is legal, where all from `start` on up to it are"""
    if kind is int:
        return _bisected(legal, int(start), LARGEST)
    # Bits of positive floats have the order of the floats.
    bits = _bisected(lambda bits: legal(_of_bits(bits)), _bits(float(start)), _bits(math.inf))
    return _of_bits(bits)


def _bisected(legal: Callable[[int], bool], low: int, high: int) -> int:
    """`low` is legal, `high` is not."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if legal(middle) else (low, middle)
    return low


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _of_bits(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]


def accepted(server: Options, extra: dict) -> bool:
    try:
        request_options(server, extra)
    except OptionError:
        return False
    return True


def presets() -> Iterator[Row]:
    """Policies whose fields a request may set by naming a preset, all of them in one row each"""
    for key, kind in METHOD_KEYS.items():
        offered = [name for name in names(kind) if "/" in name]

        def make(target: Target, number: int, key=key, offered=offered):
            return completion(extra={key: offered[number % len(offered)]})(target, number)

        if offered:
            yield Row("policies", f"{key}, every preset", make, ANSWERED, clients=min(len(offered), 48))


def varied() -> Iterator[Row]:
    """Another value in each request, for whatever is kept per value"""
    for key, value in (
        ("dlm_block_length", lambda number: 1 + number % 200),
        ("dlm_threshold", lambda number: 1 / (1 + number)),
        ("dlm_factor", lambda number: 0.1 + number / 7),
        ("dlm_cfg_scale", lambda number: number / 9),
        (WINDOW, lambda number: number % 300),
    ):

        def make(target: Target, number: int, key=key, value=value):
            others = {"dlm_threshold": "none"} if key == "dlm_factor" else AT_ONCE if key == WINDOW else {}
            extra = others | {key: value(number)}
            return completion(extra=extra, max_tokens=2 + number % 40)(target, number)

        yield Row("policies", f"{key}, another in each request", make, LEGAL, clients=50)

    algorithms = sorted(methods("decoding"))

    def algorithm(target: Target, number: int):
        extra = {"dlm_decoding": algorithms[number % len(algorithms)], "dlm_threshold": "none"}
        return completion(extra=extra, max_tokens=64)(target, number)

    yield Row("policies", "every decoding", algorithm, ANSWERED, clients=len(algorithms), long=True)

    def lengths(target: Target, number: int):
        return completion(extra=AT_ONCE, max_tokens=1 + number * 7 % target.room)(target, number)

    yield Row("policies", "another canvas length in each request", lengths, LEGAL, clients=50)
