"""A vocabulary of few texts, and an automaton of each kind of hole over it."""

import json
import re

import numpy as np

from vllm_dlm.canvas.holes import Holes
from vllm_dlm.canvas.infill import allowed_tokens
from vllm_dlm.request import hole_automata as automaton
from vllm_dlm.request.hole_automata import TokenTexts

TEXTS = [
    None, None, "a", "b", "ab", "red", "re", "d", "green", "gr", "een", '"', "\\", "\\n", '\\"', "\n", "\\u00e9", "\\u",
    "0", "1", "12", "00", "-", "-1", "1e", "e5", ".", ".5", "+3", "E", "e", " ", " 1", "é", '","', "true", "",
]  # fmt: skip
EOS, MASK = 0, 1
SIZE = len(TEXTS) + 3  # the model has more tokens than the tokenizer
TEXTS += [None] * 3
TOKENS = TokenTexts(TEXTS)
IDS = TOKENS.ids_of
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
    "one of": (automaton.one_of(COLOURS, TOKENS, of_pieces, [EOS]).automaton, lambda text: text in COLOURS),
}


def allowed(holes: Holes, position: int) -> list[int]:
    """Tokens, ascending, as the head gets them"""
    rows, which = allowed_tokens([(holes, np.array([position]))], SIZE)
    bits = np.unpackbits(rows[which[0]].view(np.uint8), count=SIZE, bitorder="little")
    return np.flatnonzero(bits).tolist()
