"""What a step of a long hole costs."""

import random

import numpy as np
import pytest

from tests.engine.holes import EOS, IDS, KINDS, MASK, SIZE, TOKENS, allowed
from vllm_dlm.canvas.automaton import MASKED, Automaton
from vllm_dlm.canvas.holes import Holes
from vllm_dlm.canvas.infill import AUTOMATA, allowed_tokens, automaton_from_plain
from vllm_dlm.request import hole_automata as automaton

LONG = 512


class Reads:
    """Counts how often a set of states is moved by a token, which is what a step of a hole consists of."""

    def __init__(self, monkeypatch):
        self.count = 0
        for name in ("after", "before"):
            monkeypatch.setattr(Automaton, name, self._counting(getattr(Automaton, name)))

    def _counting(self, move):
        def counted(automaton, states, of):
            self.count += 1
            return move(automaton, states, of)

        return counted


LONG_ONES = {name: made for name, (made, _) in KINDS.items()}
for name, text in (("letters", "".join(random.Random(0).choices("ab", k=LONG))), ("one letter", "a" * LONG)):
    LONG_ONES[name] = automaton.one_of([text], TOKENS, lambda text: [], [EOS]).automaton


@pytest.mark.parametrize("made", LONG_ONES.values(), ids=LONG_ONES)
def test_all_positions_of_a_long_hole_at_once(made, monkeypatch):
    """Each position is looked at some times, however many tokens are accepted; it was once for each of them."""
    canvas, rng = np.full(LONG, MASK), random.Random(0)
    holes, tokens = Holes([(0, LONG, made)], canvas, MASK, EOS), np.full(LONG, EOS)
    order = rng.sample(range(LONG), LONG)
    for index in order:  # a hole that is filled one by one
        if holes.holes[0].classes[index] == MASKED:
            tokens[index] = rng.choice(allowed(holes, index))
            holes.put([index], tokens[index])
            holes.over()
    holes, reads = Holes([(0, LONG, made)], canvas, MASK, EOS), Reads(monkeypatch)
    assert len(holes.accepted(np.arange(LONG), tokens, order)) == LONG
    assert reads.count <= 4 * LONG
    assert [each for each in holes.holes[0].classes if each != made.end_class] == [
        each for each in made.classes_of(tokens).tolist() if each != made.end_class
    ]


@pytest.mark.parametrize("made", LONG_ONES.values(), ids=LONG_ONES)
def test_proposals_that_contradict_each_other(made, monkeypatch):
    rng, reads = random.Random(0), Reads(monkeypatch)
    for ends in (0, 1, LONG // 2):
        holes = Holes([(0, LONG, made)], np.full(LONG, MASK), MASK, EOS)
        rows, which = allowed_tokens([(holes, np.arange(LONG))], SIZE)
        bits = np.unpackbits(rows[which].view(np.uint8), axis=1, count=SIZE, bitorder="little")
        tokens = np.array([rng.choice(np.flatnonzero(each).tolist()) for each in bits])
        tokens[rng.sample(range(LONG), ends)] = EOS
        reads.count, order = 0, rng.sample(range(LONG), LONG)
        taken = holes.accepted(np.arange(LONG), tokens, order)
        assert (order[0] in taken) == bits[order[0], tokens[order[0]]] and reads.count <= LONG * LONG / 8


def test_requests_with_equal_holes_share_one_automaton():
    made, _ = KINDS["one of"]
    first, second = (automaton_from_plain(made.plain()) for _ in range(2))
    assert first is second and automaton_from_plain(KINDS["string"][0].plain()) is not first
    assert first.tokens.nbytes + first.own.nbytes <= 16 * len(IDS)  # nothing as long as the vocabulary
    for bound in range(AUTOMATA.bound + 5):
        automaton_from_plain(automaton.one_of(["a" * (bound + 1)], TOKENS, lambda text: [], [EOS]).automaton.plain())
    assert len(AUTOMATA) == AUTOMATA.bound
