"""Templates: a text with holes.

`[[n]]` is a hole of n tokens. `[[n:string]]` takes the contents of a JSON string
without its quotes, `[[n:number]]` a JSON number, `[[n:one of "a"|"b"]]` one of
these texts, each written as a JSON string. Doubled brackets are text: `[[[[` is
the text `[[`. In `[[[`, the first bracket is text and the others begin a hole.
"""

import json
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from vllm_dlm.shown import shown

Kind = Literal["free", "string", "number", "one of"]
KINDS: tuple[Kind, ...] = ("string", "number", "one of")

#: maximum number of alternatives of a hole, and of characters in all of them
MOST_ALTERNATIVES, MOST_CHARACTERS = 64, 512
HOW = 'a hole is [[n]], [[n:string]], [[n:number]] or [[n:one of "a"|"b"]], and [[[[ is the text [['

#: doubled brackets, or the opening brackets of a hole
_BRACKETS = re.compile(r"\[\[\[\[|\[\[(?!\[)")
_HEAD = re.compile(r"\[\[\s*(\d+)\s*")
_KIND = re.compile(r":\s*(string|number|one of)\s*")
_BAR = re.compile(r" *(\|?) *")


class TemplateError(ValueError):
    pass


class Part(NamedTuple):
    """A fixed text"""

    text: str


@dataclass(frozen=True)
class Hole:
    length: int  # tokens
    kind: Kind = "free"
    alternatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class TemplateBounds:
    """Limits of a template. Parsing stops with an error as soon as one is exceeded."""

    hole: int  # tokens of one hole
    holes: int
    automata: int  # distinct alternatives

    def check(self, holes: int, automata: int) -> None:
        if holes > self.holes:
            raise TemplateError(f"it has more than {self.holes} holes (--dlm-config limits.template_holes)")
        if automata > self.automata:
            most = f"{self.automata} distinct `one of` holes"
            raise TemplateError(f"it has more than {most} (--dlm-config limits.template_automata)")


def parse(template: str, bounds: TemplateBounds) -> list[Part | Hole]:
    """The fixed texts and holes of a template, in order"""
    parts: list[Part | Hole] = []
    text, at, holes, alternatives = list[str](), 0, 0, set[tuple[str, ...]]()
    while found := _BRACKETS.search(template, at):
        text.append(template[at : found.start()])
        if found[0] == "[[[[":
            text.append("[[")
            at = found.end()
            continue
        hole, at = _hole(template, found.start(), bounds.hole)
        holes += 1
        if hole.kind == "one of":
            alternatives.add(hole.alternatives)
        bounds.check(holes, len(alternatives))
        parts += [Part(fixed), hole] if (fixed := "".join(text)) else [hole]
        text.clear()
    if fixed := "".join([*text, template[at:]]):
        parts.append(Part(fixed))
    if not holes:
        raise TemplateError(f"it has no hole: {HOW}")
    return parts


def _hole(template: str, start: int, longest: int) -> tuple[Hole, int]:
    """The hole that begins at `start`, and its end"""
    where = f"at character {start}, {shown(template[start : start + 24])}"
    if not (head := _HEAD.match(template, start)):
        raise TemplateError(f"{where} is not a hole: {HOW}")
    # int() raises an error for thousands of digits
    length = int(head[1]) if len(head[1]) <= len(str(longest)) else longest + 1
    if not 1 <= length <= longest:
        raise TemplateError(f"{where}: the length of a hole must be between 1 and {longest} tokens")
    if not (kind := _KIND.match(template, head.end())):
        return Hole(length), _closed(template, head.end(), where)
    if kind[1] != "one of":
        return Hole(length, kind[1]), _closed(template, kind.end(), where)  # type: ignore[arg-type]
    alternatives, at = _alternatives(template, kind.end(), where)
    return Hole(length, "one of", alternatives), _closed(template, at, where)


def _closed(template: str, at: int, where: str) -> int:
    if not template.startswith("]]", at):
        raise TemplateError(f"{where} is not a hole: {HOW}")
    return at + 2


def _alternatives(template: str, at: int, where: str) -> tuple[tuple[str, ...], int]:
    found: list[str] = []
    while True:
        try:
            text, at = json.JSONDecoder().raw_decode(template, at)
        except (ValueError, RecursionError):
            raise TemplateError(
                f'{where}: alternatives must be JSON strings separated by |, for example "a"|"b"'
            ) from None
        if not isinstance(text, str) or _lone_surrogate(text):
            raise TemplateError(f"{where}: the alternative {shown(text)} is not a text")
        found.append(text)
        if len(found) > MOST_ALTERNATIVES or sum(map(len, found)) > MOST_CHARACTERS:
            raise TemplateError(
                f"{where}: at most {MOST_ALTERNATIVES} alternatives with {MOST_CHARACTERS} characters in total"
            )
        bar = _BAR.match(template, at)
        assert bar is not None, "the pattern also matches the empty string"
        at = bar.end()
        if not bar[1]:
            return tuple(dict.fromkeys(found)), at


def _lone_surrogate(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)
