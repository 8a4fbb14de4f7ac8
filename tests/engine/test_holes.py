"""A hole is valid in whatever order, however many positions at once and with whatever proposals it is filled."""

import itertools
import random

import numpy as np
import pytest
import torch

from tests.engine.holes import EOS, IDS, KINDS, MASK, SIZE, TEXTS, TOKENS, allowed
from tests.engine.naive_holes import NaiveAutomaton, NaiveHole
from vllm_dlm.canvas.automaton import MASKED, NEVER, Automaton
from vllm_dlm.canvas.holes import Holes
from vllm_dlm.canvas.infill import allowed_tokens, rule_out_others
from vllm_dlm.request import hole_automata as automaton
from vllm_dlm.request.hole_automata import TokenTexts


def class_of(made: Automaton, token: int) -> int:
    return int(made.classes_of(np.array([token]))[0])


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
    made, rng = Automaton.from_plain(made.plain()), random.Random(seed)  # as it arrives
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
            tokens.append(rng.choice(allowed(holes, position)))
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
        token = allowed(holes, position)[0]
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
        candidates = np.flatnonzero(made.classes_of(np.arange(SIZE)) != NEVER).tolist()

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
        token = rng.choice(sorted(set(candidates) & set(allowed(holes, first))))
        holes.put([first], token)
        for index in set(range(3)) - {first}:
            stands = [MASK] * 3
            stands[first] = token
            for other in candidates:
                stands[index] = other
                want = completions(list(stands))
                assert (other in allowed(holes, index)) == want, (stands, kind)
                assert holes.holes[0].fits(index, class_of(made, other)) == want


def test_what_a_string_may_hold():
    made, _ = KINDS["string"]
    texts = {TEXTS[token] for token in allowed(Holes([(0, 1, made)], np.array([MASK]), MASK, EOS), 0) if token != EOS}
    assert {"a", "\\n", '\\"', "\\u00e9", "é", " ", "1"} <= texts
    assert not texts & {'"', "\\", "\n", "\\u", '","', None, ""}


def test_characters_that_a_tokenizer_cuts():
    """An alternative whose tokens are parts of characters is written by those tokens."""
    texts = TokenTexts([None, None, "a", None, None, "b"])  # 3 and 4 together are a character
    found = automaton.one_of(("aß", "ab"), texts, lambda text: [2, 3, 4] if "ß" in text else [2, 5], [0])
    assert found.fewest == (3, 2)
    made = found.automaton
    holes = Holes([(0, 3, made)], np.full(3, 1), 1, 0)
    assert [token for token in range(6) if holes.holes[0].fits(1, class_of(made, token))] == [3, 5]
    holes.put([1], 3)
    assert [token for token in range(6) if holes.holes[0].fits(2, class_of(made, token))] == [4]
    holes.put([1], 5)
    assert holes.over().tolist() == [2]


def test_how_few_tokens_an_alternative_has():
    found = automaton.one_of(("redred", "ab", "abx", ""), TOKENS, lambda text: [], [EOS])
    assert found.fewest == (2, 1, None, 0)


def test_bits_on_the_way_to_the_head():
    made, _ = KINDS["number"]
    holes = Holes([(4, 3, made)], np.full(9, MASK), MASK, EOS)
    positions = np.array([4, 5, 2, 4])  # 2 is in no hole of the template
    rows, which = allowed_tokens([(None, np.array([7])), (holes, positions)], SIZE)
    assert rows.dtype == np.int32 and len(rows) == 3 and which.tolist() == [0, 1, 2, 0, 1]
    logits = torch.zeros(5, SIZE)
    rule_out_others(logits, torch.from_numpy(rows), torch.from_numpy(which))
    assert (logits[[0, 3]] == 0).all()
    for row, index in ((1, 0), (2, 1), (4, 0)):
        kept = np.array([holes.holes[0].fits(index, class_of(made, token)) for token in range(SIZE)])
        assert (logits[row].numpy() == np.where(kept, 0, np.float32(-1e30))).all()


def test_the_first_read_of_a_long_hole_is_not_the_last():
    made, _ = KINDS["free"]
    holes = Holes([(0, 2000, made)], np.full(2000, MASK), MASK, EOS)
    holes.put([1000], 2)
    assert EOS not in allowed(holes, 3) and EOS in allowed(holes, 1001)
    holes.put([1500], EOS)
    assert holes.over().tolist() == list(range(1501, 2000))
    assert set(holes.holes[0].classes[:1000]) == {MASKED}


# -- against the naive twin ----------------------------------------------------------------------


def random_automaton(rng: random.Random) -> Automaton:
    """A random automaton with few states and classes; it can fill a hole of any length."""
    states = rng.randint(1, 7)
    ends = sorted({states - 1, *rng.choices(range(states), k=rng.randint(0, 2))})
    pairs_of = [([2], tuple((state, min(state + 1, states - 1)) for state in range(states)))]
    for token in range(3, rng.randint(4, 12)):
        found = {tuple(sorted(rng.choices(range(states), k=2))) for _ in range(rng.randint(1, 6))}
        pairs_of.append(([token], tuple(sorted(found))))
    starts = sorted({0, *rng.choices(range(states), k=rng.randint(0, 1))})
    return automaton.built(states, starts, ends, pairs_of, SIZE, [EOS])


@pytest.mark.parametrize("seed", range(150))
def test_as_the_naive_twin(seed):
    """Random automata and random steps: what is allowed, accepted and over, with tokens replaced and taken back"""
    rng = random.Random(seed)
    made = rng.choice([random_automaton(rng), random_automaton(rng), *(kind[0] for kind in KINDS.values())])
    twin, length = NaiveAutomaton(made), rng.randint(6, 24)
    made = Automaton.from_plain(made.plain())
    holes, hole = Holes([(3, length, made)], np.full(length + 5, MASK), MASK, EOS), NaiveHole(length, twin)
    tokens_of = {of: np.flatnonzero(twin.classes == of).tolist() for of in twin.moves}
    for _ in range(12):
        rows, which = allowed_tokens([(holes, np.arange(3, 3 + length))], SIZE)
        bits = np.unpackbits(rows[which].view(np.uint8), axis=1, count=SIZE, bitorder="little")
        for index in range(length):
            assert (bits[index] == np.isin(twin.classes, list(hole.allowed(index)))).all()
        indices = rng.sample(range(length), rng.randint(1, length))
        indices.sort(key=lambda index: hole.classes[index] != MASKED)
        of = [rng.choice(sorted(tokens_of)) for _ in indices]
        tokens = np.array([rng.choice(tokens_of[each] or [MASK]) for each in of])
        wanted = list(zip(indices, twin.classes[tokens].tolist(), strict=True))
        taken = holes.accepted(np.array(indices) + 3, tokens, range(len(indices)))
        assert taken.tolist() == hole.accepted(wanted) and holes.holes[0].classes == hole.classes
        over = hole.over()
        assert holes.over().tolist() == [3 + index for index in over]
        for index in over:
            hole.classes[index] = twin.end_class
        filled = [index for index in range(length) if hole.classes[index] not in (MASKED, twin.end_class)]
        for index in rng.sample(filled, min(len(filled), rng.randint(0, 3))):
            holes.put([3 + index], None)
            hole.classes[index] = MASKED
        assert [set(bits_in(each)) for each in holes.holes[0].reachable] == [*map(hole.reachable, range(length + 1))]


def bits_in(states: int) -> list[int]:
    return [state for state in range(states.bit_length()) if states >> state & 1]


@pytest.mark.parametrize("seed", range(40))
def test_an_automaton_of_alternatives_is_their_texts(seed):
    """Every sequence of up to four tokens, against the texts themselves"""
    rng = random.Random(seed)
    texts = TokenTexts([None, None, *{"".join(rng.choices("ab", k=rng.randint(1, 3))) for _ in range(4)}, None])
    alternatives = ["".join(rng.choices("ab", k=rng.randint(0, 5))) for _ in range(rng.randint(1, 4))]
    found = automaton.one_of(alternatives, texts, lambda text: [], [EOS])
    tokens = [EOS, *(token for token, text in enumerate(texts.texts) if text)]
    for sequence in itertools.product(tokens, repeat=4):
        ended = sequence.index(EOS) if EOS in sequence else 4
        text = "".join(texts.texts[token] or "" for token in sequence[:ended])
        want = set(sequence[ended:]) <= {EOS} and text in alternatives
        states = found.automaton.starting
        for of in found.automaton.classes_of(np.array(sequence)).tolist():
            states = found.automaton.after(states, of)
        assert bool(states & found.automaton.ending) == want, (alternatives, sequence)
