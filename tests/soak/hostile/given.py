"""Rows of what a request gives of its canvas: templates, suffixes, starting texts."""

import json
import math
from collections.abc import Callable, Iterator

from tests.soak.hostile.rows import (
    ANSWERED,
    AT_ONCE,
    COMPLETIONS,
    LEGAL,
    PROMPT,
    REFUSED,
    Message,
    Row,
    Target,
    posted,
)
from vllm_dlm.request.template import MOST_ALTERNATIVES, MOST_CHARACTERS

WIDE = 9  # tokens of a hole that has room for a letter and a number


def rows(target: Target) -> Iterator[Row]:
    yield from templates(target)
    yield from texts(target)


# -- templates -----------------------------------------------------------------------------


def template(text: Callable[[Target, int], str], **fields) -> Callable[[Target, int], Message]:
    """A request with that template; the canvas is as long as the template."""

    def make(target: Target, number: int) -> Message:
        body = target.body(number, extra={"dlm_template": text(target, number), **AT_ONCE}, **fields)
        return posted(COMPLETIONS, body | ({} if "max_tokens" in fields else {"max_tokens": target.room}))

    return make


def one_of(*alternatives: str) -> str:
    return "one of " + "|".join(json.dumps(each) for each in alternatives)


def templates(target: Target) -> Iterator[Row]:
    limits = target.server.limits
    hole = min(512, target.room - 1)  # tokens

    def fits(tokens: int) -> frozenset[int]:
        return LEGAL if tokens < target.room else REFUSED

    def row(name: str, text: Callable[[Target, int], str], expected=REFUSED, **more) -> Row:
        return Row("template", name, template(text), expected, **more)

    def holes(number: int) -> Callable[[Target, int], str]:
        return lambda t, n: f"{t.seed % 10}{n % 10}" + "[[1]]" * number

    def distinct(count: int) -> Callable[[Target, int], str]:
        return lambda t, n: "".join(f"[[{WIDE}:{one_of(f'a{t.seed}', f'b{n}', f'c{each}')}]]" for each in range(count))

    many = target.large // 10
    yield row("4,000 holes of the model's length", lambda t, n: f"y{t.seed}/{n} " + f"[[{t.max_model_len}]] x " * 4000)
    yield row("one hole as long as the room", lambda t, n: f"[[{t.room - 1}]]", LEGAL)
    yield row("one hole one token too long", lambda t, n: f"[[{t.room}]]")
    yield row("a hole of 10^4000 tokens", lambda t, n: "[[1" + "0" * 4000 + "]]")
    yield row("a hole of no token", lambda t, n: f"{n}[[0]]")
    longest = limits.template_characters
    yield row("template_characters, all text", lambda t, n: t.text(longest - 5, n) + "[[1]]")
    yield row("template_characters, one above", lambda t, n: t.text(longest - 4, n) + "[[1]]")
    yield row("480 kB of text", lambda t, n: t.text(min(480_000, t.large), n) + "[[1]]")
    yield row("10 MB of text", lambda t, n: t.text(t.large, n) + "[[1]]", like="text")
    yield row("10 MB of [[[[", lambda t, n: f"{t.seed} {n}" + "[[[[" * (t.large // 4) + "[[1]]", like="text")
    yield row("10 MB of [[1]]", lambda t, n: f"{t.seed} {n}" + "[[1]]" * (t.large // 5), like="text")
    yield row("10 MB of [[ that no ]] closes", lambda t, n: f"{t.seed} {n}" + "[[1 " * (t.large // 4), like="text")
    yield row("10 MB of spaces in a hole", lambda t, n: f"{n}[[1" + " " * t.large + "]]", ANSWERED, like="text")
    yield row("template_holes", holes(limits.template_holes), fits(limits.template_holes + 2), long=True)
    yield row("template_holes, one above", holes(limits.template_holes + 1))
    most = limits.template_automata
    yield row("template_automata distinct holes", distinct(most), fits(WIDE * most))
    yield row("template_automata distinct holes, one above", distinct(most + 1))
    yield row("1,000 distinct holes", distinct(1000))
    yield row(
        "the same hole 30 times",
        lambda t, n: f"[[{WIDE}:{one_of(f'a{t.seed}', f'b{n}', 'c' * 3)}]]" * 30,
        fits(30 * WIDE + 1),
    )
    long = MOST_CHARACTERS
    alternative = fits(hole)
    yield row(
        f"an alternative of {long} characters",
        lambda t, n: f"[[{hole}:{one_of((f'a{t.seed}b{n}' + 'the ' * long)[: min(long, hole)])}]]",
        alternative,
    )
    yield row(
        f"an alternative of {long + 1} characters",
        lambda t, n: f"[[{hole}:{one_of((f'a{t.seed}b{n}' + 'x' * long)[: long + 1])}]]",
    )
    number = MOST_ALTERNATIVES
    yield row(
        f"{number} alternatives",
        lambda t, n: f"[[8:{one_of(*(f'{each}{n % 10}' for each in range(number)))}]]",
        LEGAL,
    )
    yield row(
        f"{number + 1} alternatives",
        lambda t, n: f"[[8:{one_of(*(f'{each}{n % 10}' for each in range(number + 1)))}]]",
    )
    yield row("10 MB of alternatives", lambda t, n: f"[[8:{one_of(*(f'a{n}' for _ in range(many)))}]]", like="text")
    yield row("an alternative of 10 MB", lambda t, n: f"[[8:{one_of('a' * t.large)}]]", like="text")
    for kind in ("string", "number"):
        yield row(f"a hole of {hole} {kind} tokens", lambda t, n, kind=kind: f"{n}: [[{hole - 9}:{kind}]]", fits(hole))
    yield row("alternatives that nest arrays", lambda t, n: "[[8:one of " + "[" * (t.large // 2) + "]]", like="text")
    yield row("a lone surrogate in text", lambda t, n: f"\ud800{n}[[2]]", ANSWERED)
    yield row("a lone surrogate as an alternative", lambda t, n: f'[[2:one of "\\ud800{n}"]]')
    yield row("NUL and emoji", lambda t, n: f"\x00\U0001f600{n}[[2]]", ANSWERED)
    yield row("no hole", lambda t, n: t.text(100, n))
    yield Row(
        "template", "as a list of 10 MB", template(lambda t, n: ["[[1]]"] * (t.large // 8)), REFUSED, like="strings"
    )
    yield Row("template", "with max_tokens 1", template(lambda t, n: f"{n} [[4]]", max_tokens=1), REFUSED)
    yield row(
        "flood of 44 kB templates",
        lambda t, n: f"y{t.seed}/{n} " + f"[[{t.max_model_len}]] x " * 4000,
        clients=target.flood,
    )
    yield row("flood of 1,000 distinct holes", distinct(1000), clients=target.flood)
    yield row(
        "flood of holes with own alternatives",
        lambda t, n: f"[[64:{one_of((f'a{t.seed}b{n}' + 'the ' * 64)[:64])}]]",
        fits(64),
        clients=target.flood,
    )


# -- suffixes and starting texts -----------------------------------------------------------


def given(value: Callable[[Target, int], object], key: str, others: dict | None = None, **fields):
    def make(target: Target, number: int) -> Message:
        extra = {key: value(target, number), **AT_ONCE, **(others or {})}
        return posted(COMPLETIONS, target.body(number, extra=extra, **fields))

    return make


def texts(target: Target) -> Iterator[Row]:
    behind = target.max_model_len - PROMPT - 1  # tokens of a suffix that leave one position for the canvas
    for key, longest, more in (
        ("dlm_suffix", behind, {"max_tokens": 1}),
        ("dlm_start", target.room, {"max_tokens": target.room}),
    ):
        others = {"dlm_remask": 0.02} if key == "dlm_start" else {}

        def row(name: str, value, expected=REFUSED, key=key, others=others, more=more, **fields) -> Row:
            return Row("given", f"{key}, {name}", given(value, key, others, **more), expected, **fields)

        yield row("largest", lambda t, n, longest=longest: [5 + n % 100] * longest, LEGAL)
        yield row("one token above", lambda t, n, longest=longest: [5 + n % 100] * (longest + 1))
        yield row("10 MB of text", lambda t, n: t.text(t.large, n), like="text")
        yield row("10 MB of token ids", lambda t, n: [5 + n % 100] * (t.large // 4), like="ids")
        yield row("10 MB of masks as text", lambda t, n: f"{n}" + "<|mdm_mask|>" * (t.large // 12), like="text")
        yield row("ids that nest", lambda t, n: [[5], [n]])
        yield row("an id above the vocabulary", lambda t, n: [5, t.vocab_size + n])
        yield row("a negative id", lambda t, n: [5, -1 - n])
        yield row("a lone surrogate", lambda t, n: f"a\udcff{n}", ANSWERED)
        yield row(
            "flood of 1 MB texts",
            lambda t, n: t.text(t.large // 10, n),
            ANSWERED,
            clients=target.flood,
            like="flood of text",
        )
    yield Row(
        "given",
        "suffix (vLLM's field), 10 MB of text",
        lambda t, n: posted(COMPLETIONS, t.body(n, suffix=t.text(t.large, n))),
        REFUSED,
        like="text",
    )
    for name, value, expected in (
        ("largest", 1, LEGAL),
        ("one above", math.nextafter(1, 2), REFUSED),
        ("absurd", math.nan, REFUSED),
        ("nothing remasked", 0, LEGAL),
    ):
        for decoding in ("low_confidence", "wino"):
            yield Row("given", f"dlm_remask of {decoding}, {name}", remasked(decoding, value), expected)


def remasked(decoding: str, share: float):
    """A starting text of 40 tokens in a canvas of 48"""

    def make(target: Target, number: int) -> Message:
        draft = [5 + number % 100] * 40
        extra = {"dlm_start": draft, "dlm_remask": share, "dlm_decoding": decoding}
        return posted(COMPLETIONS, target.body(number, extra=extra, max_tokens=48))

    return make
