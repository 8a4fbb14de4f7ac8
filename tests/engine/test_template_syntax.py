"""What a template may be written as."""

import json
import re
import sys

import pytest

from vllm_dlm.options.limits import Limits
from vllm_dlm.request.template import Hole, Part, TemplateBounds, TemplateError, parse

BOUNDS = TemplateBounds(hole=100, holes=100, automata=100)

PARSED = {
    "a[[3]]b": [Part("a"), Hole(3), Part("b")],
    "[[12:number]]": [Hole(12, "number")],
    '{"a": [[[2:string]]], "b": [[[[1, 2]]]]}[[1]]': [
        Part('{"a": ['),
        Hole(2, "string"),
        Part('], "b": [[1, 2]]]]}'),
        Hole(1),
    ],
    '[[4:one of "a" | "]]\\"b"|"a"]]': [Hole(4, "one of", ("a", ']]"b'))],
    "[[2]][[3]]": [Hole(2), Hole(3)],
    "[[[[[[2]]": [Part("[["), Hole(2)],
    "[[[[[[[2]]": [Part("[[["), Hole(2)],
}


@pytest.mark.parametrize("template", PARSED)
def test_parsed(template):
    assert parse(template, BOUNDS) == PARSED[template]


WRONG = {
    "no hole": "it has no hole", "[[[[3]]": "it has no hole", "": "it has no hole",
    "a [[x]]": "at character 2", "[[3": "is not a hole", "[[3:words]]": "is not a hole", "[[3:string": "is not a hole",
    "[[0]]": "between 1 and 100", "[[101]]": "between 1 and 100", f"[[{'9' * 5000}]]": "between 1 and 100",
    "[[-1]]": "is not a hole", "[[1.5]]": "is not a hole", "[[3:one of]]": "JSON strings",
    '[[3:one of "a]]': "JSON strings",
    '[[3:one of "a"|]]': "JSON strings", "[[3:one of 3]]": "is not a text", '[[3:one of "a" "b"]]': "is not a hole",
    '[[3:one of "\\ud800"]]': "is not a text",
    f'[[3:one of {"|".join(json.dumps(str(n)) for n in range(65))}]]': "at most 64",
    f'[[3:one of {json.dumps("a" * 600)}]]': "512 characters", f'[[3:one of {"[" * 100_000}]]': "JSON strings",
}  # fmt: skip


@pytest.mark.parametrize("template", WRONG, ids=range(len(WRONG)))
def test_what_is_no_template(template):
    with pytest.raises(TemplateError) as error:
        parse(template, BOUNDS)
    assert WRONG[template] in str(error.value) and len(str(error.value)) < 400


MANY = {
    "holes": ("[[1]]" * 9, "it has more than 8 holes (--dlm-config limits.template_holes)"),
    "alternatives": (
        "".join(f'[[3:one of "a{n}"]]' for n in range(5)),
        "it has more than 4 distinct `one of` holes",
    ),
}


@pytest.mark.parametrize(("template", "says"), MANY.values(), ids=MANY)
def test_holes_and_automata_are_bounded(template, says):
    with pytest.raises(TemplateError, match=re.escape(says)):
        parse(template, TemplateBounds(100, 8, 4))
    assert parse("[[1]]" * 8 + '[[3:one of "a"]]' * 0, TemplateBounds(100, 8, 4))


def lines_run(template: str) -> int:
    """Lines of Python that parsing it runs, without those of callbacks of the garbage collector"""
    count = 0

    def tracer(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename != parse.__code__.co_filename:
            return None
        count += event == "line"
        return tracer

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        parse(template, TemplateBounds(100, 1 << 20, 1 << 20))
    finally:
        sys.settrace(before)
    return count


def test_parsing_is_linear():
    """Text costs no line of Python for a character, and holes cost the same each."""
    short, long = (lines_run("y" * length + "[[[[" + "z" * length + "[[2]]") for length in (10, 50_000))
    assert short == long
    first, second, third = (lines_run("y[[2]]" * count) for count in (100, 200, 300))
    assert second - first == third - second


def test_limits_name_themselves():
    assert Limits().template_characters == 1 << 16
    for field in ("template_characters", "template_holes", "template_automata"):
        with pytest.raises(ValueError, match=f"^{field}: 0 is not valid, it must be at least 1"):
            Limits(**{field: 0})
