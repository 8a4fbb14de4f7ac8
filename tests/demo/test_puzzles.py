"""Long answers whose tokens need each other: what they say, and what their lessons hide."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from benchmarks.demo import tokenizer as tok
from benchmarks.demo.puzzles import MOST, PUZZLES, PuzzleLessons
from benchmarks.demo.train import PuzzleRecipe, PuzzleTraining

TINY = PuzzleRecipe(steps=40, decay_steps=20, ledger_tokens=150, other_tokens=150, warm_up=2)


def words(sample) -> tuple[list[str], list[str]]:
    """Of the question and of its answer"""
    content = sample.prompt_ids[len(tok.CHAT_PREFIX) : -len(tok.CHAT_SUFFIX)]
    assert sample.prompt_ids == tok.CHAT_PREFIX + content + tok.CHAT_SUFFIX and sample.answer_ids[-1] == tok.EOT
    return tok.decode(content).split(), tok.decode(sample.answer_ids).split()


@pytest.mark.parametrize("items", [2, 7, 26, 80])
def test_answers_are_right(items):
    rng = np.random.default_rng(items)
    (_, *asked), answer = words(PUZZLES["ledger"](rng, items))
    total = 0
    for index in range(items):
        total = (total + int(asked[2 * index + 1])) % 4
        assert answer[2 * index : 2 * index + 2] == [asked[2 * index], str(total)]
    asked, answer = words(PUZZLES["chain"](rng, items))
    arrows = dict(" ".join(asked[1:-2]).rstrip(",").split(", ")[i].split() for i in range(items - 1))
    assert answer[0] == asked[-1] and all(arrows[a] == b for a, b in pairwise(answer)) and len(answer) == items
    if items <= MOST["order"]:
        (_, *asked), answer = words(PUZZLES["order"](rng, items))
        assert answer == sorted(asked) and len(set(asked)) == items


def test_the_longest_answer_fills_a_canvas_of_256():
    sample = PUZZLES["ledger"](np.random.default_rng(0), MOST["ledger"])
    assert 224 < len(sample.answer_ids) <= 256


@pytest.mark.parametrize("step", [0, 1, 400, 2000])
def test_lessons_hide_answers_and_count_some_of_what_is_hidden(step):
    lessons = PuzzleLessons(1, 600, 500)
    for batch, again in zip(lessons.batches(step), lessons.batches(step), strict=True):
        assert torch.equal(batch.ids_BT, again.ids_BT)
        assert (batch.ids_BT[:, : -batch.tail] != tok.MASK).all()
        hidden = batch.ids_BT[:, -batch.tail :] == tok.MASK
        assert (hidden | ~batch.masked_BR).all() and batch.masked_BR.any()
        assert len(batch.labels_N) == len(batch.weights_N) == batch.masked_BR.sum()
        assert (batch.labels_N != tok.MASK).all() and (batch.weights_N > 0).all()


def test_a_resumed_run_goes_on_as_if_it_had_never_stopped():
    through, stopped, resumed = (PuzzleTraining(TINY) for _ in range(3))
    for _ in range(2):
        through.learn()
    stopped.learn()
    resumed.restore(stopped.state())
    resumed.learn()
    for name, value in through.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
