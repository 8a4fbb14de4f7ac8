"""Rows of /v1/dlm/score: fields at the bounds of their declaration; pairs, characters and draws at their limits."""

import math
from collections.abc import Iterator
from typing import Any

import annotated_types

from tests.soak.hostile.rows import ANSWERED, LEGAL, REFUSED, SCORE, Message, Row, Target, posted
from vllm_dlm.scoring.scores import How

#: a full-attention model reads these fields with this method
METHODS = {"steps": "blocks"}


def scored(context: Any, continuation: Any, **how):
    """`context` and `continuation`: values, or functions of the target and the number"""

    def make(target: Target, number: int) -> Message:
        def value(given: Any) -> Any:
            return given(target, number) if callable(given) else given

        body = {"model": target.model, "context": value(context), "continuation": value(continuation)}
        return posted(SCORE, body | {name: value(each) for name, each in how.items()})

    return make


def short(target: Target, number: int) -> str:
    return f"Copy: {target.seed} {number}"


def rows(target: Target) -> Iterator[Row]:
    yield from of_fields(target)
    yield from of_amounts(target)


def of_fields(target: Target) -> Iterator[Row]:
    for name, field in How.model_fields.items():
        largest = above = None
        for bound in field.metadata:
            if isinstance(bound, annotated_types.Le):
                largest, above = bound.le, math.nextafter(bound.le, math.inf)
                above = bound.le + 1 if isinstance(bound.le, int) and name != "cfg_scale" else above
            elif isinstance(bound, annotated_types.Lt):
                largest, above = bound.lt - 1, bound.lt
        others = {"mc_num": 16} if name in ("seed", "batch_size") else {}
        if name in METHODS:
            others = {"method": METHODS[name]}
        how = {"mc_num": 1} if not others and name != "mc_num" else others

        def row(which: str, value: Any, expected=REFUSED, name=name, how=how, **more) -> Row:
            return Row("score", f"{name}, {which}", scored(short, " a b", **(how | {name: value})), expected, **more)

        if largest is not None:
            yield row("largest", largest, LEGAL)
            yield row("one above", above)
        yield row("absurd", "x" * target.large, like="text")
    yield Row(
        "score", "an unknown field of 10 MB", scored(short, " a", **{"z" * target.large: 1}), REFUSED, like="text"
    )


def of_amounts(target: Target) -> Iterator[Row]:
    limits = target.server.limits

    def row(name: str, context: Any, continuation: Any, expected=REFUSED, clients=2, long=False, like="", **how) -> Row:
        how = {"mc_num": 1} | how
        return Row("score", name, scored(context, continuation, **how), expected, clients, long=long, like=like)

    def letters(count: int) -> list[str]:
        return [f" {'abcdefghijklmnopqrstuvwxyz'[each % 26]}" for each in range(count)]

    def context(size: int):
        return lambda t, n: t.text(size, n)

    pairs, characters = limits.score_pairs, limits.score_characters
    yield row("score_pairs", short, letters(pairs), LEGAL, clients=1, long=True)
    yield row("score_pairs, one above", short, letters(pairs + 1))
    yield row("1,000 continuations of a 15 kB context", context(15_000), letters(1000), ANSWERED, long=True)
    yield row("10,000 continuations of a 16 kB context", context(16_000), letters(10_000))
    yield row("score_characters, one above", context(characters), " a")
    yield row("a context of 10 MB", context(target.large), " a", like="text")
    yield row("a continuation of 10 MB", short, context(target.large), like="text")
    yield row("10 MB of contexts", lambda t, n: [f"a{n}"] * (t.large // 8), " a", like="strings")
    yield row("10 MB of token ids", lambda t, n: [5 + n % 100] * (t.large // 4), [6], like="ids")
    yield row("a token above the vocabulary", [5, 6], lambda t, n: [t.vocab_size + n])
    yield row("the mask", [5, 6], [target.mask_id])
    yield row("the longest pair", lambda t, n: [5 + n % 100] * longest_context(t), [6], LEGAL)
    yield row("the longest pair and one token", lambda t, n: [5 + n % 100] * (longest_context(t) + 1), [6])
    yield row("nested lists", [[[5]]], [[6]])
    yield row("a lone surrogate", lambda t, n: f"a\udcff{n}", " b", ANSWERED)
    yield row("no continuation", short, "")
    yield row("pairs that do not match", letters(3), letters(2))
    draws = limits.score_draws
    tokens = [6, 7, 8, 9]
    yield row("mc_num 16,384", [5, 6, 7], tokens, LEGAL, mc_num=draws, batch_size=1, long=True)
    yield row("mc_num 16,384, one batch", [5, 6, 7], tokens, LEGAL, mc_num=draws, batch_size=draws, long=True)
    yield row("mc_num 16,384 of 256 tokens", [5, 6, 7], [6] * 256, ANSWERED, mc_num=draws, batch_size=1, long=True)
    yield row("score_draws, above", [5, 6, 7], [tokens, tokens], mc_num=draws, batch_size=1)
    yield row("flood of 1,000 pairs", context(15_000), letters(1000), ANSWERED, clients=target.flood, long=True)
    yield row("flood of 1 MB contexts", context(target.large // 10), " a", ANSWERED, target.flood, like="flood of text")
    yield row("flood of scores", short, " a b", LEGAL, clients=target.flood, long=True)


def longest_context(target: Target) -> int:
    """Tokens of the longest context that goes with a continuation of one token"""
    return target.max_model_len - 1
