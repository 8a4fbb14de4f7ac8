"""One small step of the recipe, its resumption, and the decoding that grades it."""

from dataclasses import replace

import pytest
import torch

from examples.demo import tokenizer as tok
from examples.demo.decoding import answered, decode
from examples.demo.lessons import Lessons
from examples.demo.tasks import WALK_WORDS
from examples.demo.train import RECIPES, Recipe, Training
from examples.demo.walks import Walks

WORD_IDS = [tok.encode(f" {word}")[0] for word in WALK_WORDS] + [tok.EOT, tok.encode(".")[0]]
TINY = Recipe(steps=40, decay_steps=20, recall_tokens=200, small_tokens=150, warm_up=2)


@pytest.mark.slow
def test_a_resumed_run_goes_on_as_if_it_had_never_stopped():
    through = Training(TINY)
    for _ in range(3):
        before = {k: v.clone() for k, v in through.model.state_dict().items()}
        through.learn()
    assert any(not torch.equal(before[k], v) for k, v in through.model.state_dict().items())

    stopped = Training(TINY)
    for _ in range(2):
        stopped.learn()
    resumed = Training(TINY)
    resumed.restore(stopped.state())
    resumed.learn()
    for name, value in through.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_another_recipes_state_is_refused():
    state = {"recipe": {"seed": 1}}
    with pytest.raises(SystemExit, match="another recipe"):
        Training(TINY).restore(state)


COURSES = {"demo": Lessons(seed=1, recall_tokens=400, small_tokens=300), "walks": Walks(seed=1)}


@pytest.mark.parametrize("step", [0, 400, 2000])
@pytest.mark.parametrize("lessons", COURSES.values(), ids=COURSES)
def test_lessons_hide_answers_and_nothing_else(lessons, step):
    for batch, again in zip(lessons.batches(step), lessons.batches(step), strict=False):
        assert torch.equal(batch.ids_BT, again.ids_BT)
        prompt_part = batch.ids_BT[:, : -batch.tail]
        assert (prompt_part != tok.MASK).all()
        assert torch.equal(batch.ids_BT[:, -batch.tail :] == tok.MASK, batch.masked_BR)
        assert len(batch.labels_N) == len(batch.weights_N) == batch.masked_BR.sum()
        assert (batch.labels_N != tok.MASK).all() and (batch.weights_N > 0).all()


def test_every_course_learns():
    for course, recipe in RECIPES.items():
        assert recipe.course == course
        training = Training(replace(recipe, recall_tokens=200, small_tokens=150))
        training.learn()
        assert all(torch.isfinite(p).all() for p in training.model.parameters())


def test_paths_grow_and_every_word_is_asked_for_behind_two_that_stand():
    longest = [Walks(1).batches(step)[0] for step in (0, 100, 599)]
    words = [(batch.ids_BT.shape[1] - 24) // 6 for batch in longest]
    assert words[0] < words[1] < words[2] <= 124 and words[2] > 110
    for batch in longest:
        assert torch.isin(batch.labels_N[batch.graded_N], torch.tensor(WORD_IDS)).all()


def test_an_answer_ends_at_the_first_end_token_with_nothing_masked_before():
    m, e = tok.MASK, tok.EOT
    assert answered([9, 9, e, m]) == [9, 9, e]
    assert answered([9, m, e, e]) is None
    assert answered([9, 9, 9, 9]) == [9, 9, 9, 9]


def test_a_stale_prompt_is_exact_in_the_first_step_only():
    model = Training(TINY).model.eval()
    prompts = torch.randint(6, 300, (2, 12))
    canvas = torch.full((2, 4), tok.MASK)
    with torch.no_grad():
        seen = torch.cat([prompts, canvas], 1)
        kept = [(k[:, :, :12], v[:, :, :12]) for k, v in model.keys_and_values(seen)]
        torch.testing.assert_close(model.forward_on(kept, canvas), model(seen, tail=4), rtol=1e-4, atol=1e-4)
        canvas[:, 0] = 50
        fresh = model(torch.cat([prompts, canvas], 1), tail=4)
        assert not torch.allclose(model.forward_on(kept, canvas), fresh, atol=1e-4)


def test_decoding_finishes_block_after_block():
    model = Training(TINY).model.eval()
    out = decode(model, torch.randint(6, 300, (3, 10)), canvas=8, block_length=4)
    assert len(out) == 3 and all(tok.MASK not in row for row in out)
