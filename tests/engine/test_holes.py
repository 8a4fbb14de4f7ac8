"""A hole is valid in whatever order, however many positions at once and with whatever proposals it is filled."""

import json
import random
import re

import numpy as np
import pytest
import torch

from vllm_dlm import automaton
from vllm_dlm.automaton import Automaton, fewest_tokens
from vllm_dlm.engine.allowed import bits_of, rule_out_others, table
from vllm_dlm.engine.holes import MASKED, Holes
from vllm_dlm.template import Hole, Part, TemplateError, parse

TEXTS = [
    None, None, "a", "b", "ab", "red", "re", "d", "green", "gr", "een", '"', "\\", "\\n", '\\"', "\n", "\\u00e9", "\\u",
    "0", "1", "12", "00", "-", "-1", "1e", "e5", ".", ".5", "+3", "E", "e", " ", " 1", "é", '","', "true", "",
]  # fmt: skip
EOS, MASK = 0, 1
SIZE = len(TEXTS) + 3  # the model has more tokens than the tokenizer
TEXTS += [None] * 3
IDS = {text: [token] for token, text in enumerate(TEXTS) if text}
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
COLOURS = ("red", "green", "a", "ab", "redab")


def of_pieces(text: str) -> list[int]:
    pieces = re.findall("red|ab|a|b|green", text)
    assert "".join(pieces) == text
    return [IDS[piece][0] for piece in pieces]


KINDS = {
    "free": (automaton.free(SIZE, [EOS], MASK), lambda text: True),
    "string": (automaton.string(TEXTS, [EOS]), lambda text: isinstance(json.loads(f'"{text}"'), str)),
    "number": (automaton.number(TEXTS, [EOS]), lambda text: NUMBER.fullmatch(text) and json.loads(text) is not None),
    "one of": (automaton.one_of(COLOURS, IDS, of_pieces, TEXTS, [EOS]), lambda text: text in COLOURS),
}


def written(tokens) -> str:
    """What the hole says; behind its end nothing else stands."""
    tokens = [int(token) for token in tokens]
    ended = tokens.index(EOS) if EOS in tokens else len(tokens)
    assert set(tokens[ended:]) <= {EOS}
    return "".join(TEXTS[token] or "?" for token in tokens[:ended])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(60))
def test_any_order(kind, seed):
    made, valid = KINDS[kind]
    made, rng = Automaton.of_plain(made.plain()), random.Random(seed)  # as it arrives
    length = rng.randint(5, 9)
    canvas = np.full(length + 2, MASK)
    holes = Holes([(1, length, made)], canvas, MASK, EOS)
    for _ in range(40 * length):
        masked = np.flatnonzero(canvas[1:-1] == MASK) + 1
        if not len(masked):
            break
        standing = np.flatnonzero(canvas[1:-1] != MASK) + 1
        positions = np.sort(np.concatenate([masked, standing[: rng.randint(0, 2)]]))  # some are edited
        tokens = []
        for position in positions.tolist():
            _, classes = holes.allowed(position)
            fitting = np.flatnonzero(np.isin(made.classes, np.frombuffer(classes, np.int16)))
            assert len(fitting)
            tokens.append(rng.choice(fitting.tolist()))
        tokens = np.array(tokens)
        order = rng.sample(range(len(positions)), rng.randint(1, len(positions)))
        order.sort(key=lambda each: canvas[positions[each]] != MASK)
        taken = holes.accepted(positions, tokens, order)
        assert order[0] in taken  # there is progress in each step
        canvas[positions[taken]] = tokens[taken]
        over = holes.over()
        assert (canvas[over] == MASK).all()
        canvas[over] = EOS
        if rng.random() < 0.1 and len(standing):  # a decoding takes one back
            back = int(rng.choice(standing.tolist()))
            if canvas[back] != EOS:
                holes.put([back], None)
                canvas[back] = MASK
    canvas_left = canvas[1:-1]
    while (canvas_left == MASK).any():
        position = int(np.flatnonzero(canvas[1:-1] == MASK)[0]) + 1
        _, classes = holes.allowed(position)
        token = int(np.flatnonzero(np.isin(made.classes, np.frombuffer(classes, np.int16)))[0])
        holes.put([position], token)
        canvas[position] = token
    assert valid(written(canvas[1:-1])), written(canvas[1:-1])


@pytest.mark.parametrize("kind", KINDS)
def test_allowed_is_all_that_can_be_completed(kind):
    """By trying every way to fill the rest of a short hole."""
    made, valid = KINDS[kind]
    if kind in ("free", "string"):
        candidates = [EOS, IDS["a"][0], IDS['"'][0], IDS["\\n"][0]]  # each is whole by itself
    else:
        candidates = [token for token in range(SIZE) if made.classes[token] >= 0]

    def completions(tokens):
        if MASK not in tokens:
            ended = tokens.index(EOS) if EOS in tokens else len(tokens)
            if set(tokens[ended:]) - {EOS} or any(TEXTS[token] is None for token in tokens[:ended]):
                return False
            try:
                return bool(valid("".join(TEXTS[token] for token in tokens[:ended])))
            except ValueError:
                return False
        at = tokens.index(MASK)
        return any(completions([*tokens[:at], token, *tokens[at + 1 :]]) for token in candidates)

    rng = random.Random(kind)
    for _ in range(12):
        holes = Holes([(0, 3, made)], np.full(3, MASK), MASK, EOS)
        first = rng.randrange(3)
        fitting = [token for token in candidates if made.classes[token] in holes.holes[0].allowed(first)]
        token = rng.choice(fitting)
        holes.put([first], token)
        for index in set(range(3)) - {first}:
            stands = [MASK] * 3
            stands[first] = token
            for other in candidates:
                stands[index] = other
                want = completions(list(stands))
                assert (made.classes[other] in holes.holes[0].allowed(index)) == want, (stands, kind)


def test_what_a_string_may_hold():
    made, _ = KINDS["string"]
    allowed = {
        TEXTS[token] for token in range(len(TEXTS)) if made.classes[token] not in (automaton.NEVER, made.end_class)
    }
    assert {"a", "\\n", '\\"', "\\u00e9", "é", " ", "1"} <= allowed
    assert not allowed & {'"', "\\", "\n", "\\u", '","', None, ""}


def test_characters_that_a_tokenizer_cuts():
    """An alternative whose tokens are parts of characters is written by those tokens."""
    texts = [None, None, "a", None, None, "b"]  # 3 and 4 together are a character
    made = automaton.one_of(
        ("aß", "ab"), {"a": [2], "b": [5]}, lambda text: [2, 3, 4] if "ß" in text else [2, 5], texts, [0]
    )
    holes = Holes([(0, 3, made)], np.full(3, 1), 1, 0)
    assert sorted(np.flatnonzero(np.isin(made.classes, holes.holes[0].allowed(1)))) == [3, 5]
    holes.put([1], 3)
    assert [int(made.classes[4])] == holes.holes[0].allowed(2).tolist()
    holes.put([1], 5)
    assert holes.over().tolist() == [2]
    assert fewest_tokens(made)[list(made.ends[:-1])].min() == 2


def test_bits_on_the_way_to_the_head():
    made, _ = KINDS["number"]
    holes = Holes([(4, 3, made)], np.full(9, MASK), MASK, EOS)
    positions = np.array([4, 5, 2, 4])  # 2 is in no hole of the template
    rows, which = table([(None, np.array([7])), (holes, positions)], SIZE)
    assert rows.dtype == np.int32 and len(rows) == 3 and which.tolist() == [0, 1, 2, 0, 1]
    logits = torch.zeros(5, SIZE)
    rule_out_others(logits, torch.from_numpy(rows), torch.from_numpy(which))
    assert (logits[[0, 3]] == 0).all()
    for row, index in ((1, 0), (2, 1), (4, 0)):
        kept = np.isin(made.classes, holes.holes[0].allowed(index))
        assert (logits[row].numpy() == np.where(kept, 0, np.float32(-1e30))).all()
    assert bits_of(made, holes.holes[0].allowed(0).tobytes(), SIZE) is bits_of(
        made, holes.holes[0].allowed(0).tobytes(), SIZE
    )


def test_the_first_read_of_a_long_hole_is_not_the_last():
    made, _ = KINDS["free"]
    holes = Holes([(0, 2000, made)], np.full(2000, MASK), MASK, EOS)
    holes.put([1000], 2)
    assert made.end_class not in holes.holes[0].allowed(3) and made.end_class in holes.holes[0].allowed(1001)
    holes.put([1500], EOS)
    assert holes.over().tolist() == list(range(1501, 2000))
    assert (holes.holes[0].classes[:1000] == MASKED).all()


PARSED = {
    'a[[3]]b': [Part("a"), Hole(3), Part("b")],
    '[[12:number]]': [Hole(12, "number")],
    '{"a": [[[2:string]]], "b": [[[[1, 2]]]]}[[1]]':
    [Part('{"a": ['), Hole(2, "string"), Part('], "b": [[1, 2]]]]}'), Hole(1)],
    '[[4:one of "a" | "]]\\"b"|"a"]]': [Hole(4, "one of", ("a", ']]"b'))],
    '[[2]][[3]]': [Hole(2), Hole(3)],
    '[[[[[[2]]': [Part("[["), Hole(2)],
    '[[[[[[[2]]': [Part("[[["), Hole(2)],
}  # fmt: skip


@pytest.mark.parametrize("template", PARSED)
def test_parsed(template):
    assert parse(template, 100) == PARSED[template]


WRONG = {
    "no hole": "it has no hole", "[[[[3]]": "it has no hole", "": "it has no hole",
    "a [[x]]": "at character 2", "[[3": "is no hole", "[[3:words]]": "is no hole", "[[3:string": "is no hole",
    "[[0]]": "1 to 100 tokens", "[[101]]": "1 to 100 tokens", f"[[{'9' * 5000}]]": "1 to 100 tokens",
    "[[-1]]": "is no hole", "[[1.5]]": "is no hole", "[[3:one of]]": "JSON strings", '[[3:one of "a]]': "JSON strings",
    '[[3:one of "a"|]]': "JSON strings", "[[3:one of 3]]": "is no text", '[[3:one of "a" "b"]]': "is no hole",
    '[[3:one of "\\ud800"]]': "is no text",
    f'[[3:one of {"|".join(json.dumps(str(n)) for n in range(65))}]]': "at most 64",
    f'[[3:one of {json.dumps("a" * 600)}]]': "512 characters", f'[[3:one of {"[" * 100_000}]]': "JSON strings",
}  # fmt: skip


@pytest.mark.parametrize("template", WRONG, ids=range(len(WRONG)))
def test_what_is_no_template(template):
    with pytest.raises(TemplateError) as error:
        parse(template, 100)
    assert WRONG[template] in str(error.value) and len(str(error.value)) < 400
