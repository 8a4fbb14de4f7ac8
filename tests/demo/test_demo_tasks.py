"""The demo's prompts say what they claim, and the tokenizer on disk is the one of the training."""

import re
from itertools import accumulate

import numpy as np
import pytest

from examples.demo import tokenizer as tok
from examples.demo.tasks import DEPTHS, SMALL_TASKS, recall, recite, walk, words_of


def question_and_answer(sample):
    content = sample.prompt_ids[len(tok.CHAT_PREFIX) : -len(tok.CHAT_SUFFIX)]
    assert sample.prompt_ids == tok.CHAT_PREFIX + content + tok.CHAT_SUFFIX
    assert sample.answer_ids[-1] == tok.EOT
    return tok.decode(content), tok.decode(sample.answer_ids)


def some_of_everything(filler):
    rng = np.random.default_rng(5)
    for task in SMALL_TASKS.values():
        yield from (task(rng) for _ in range(5))
    for value in ("word", "1", "5"):
        yield recite(rng, 4, value)
    yield recall(rng, filler, 200, needles=4, queried=3)


def test_the_written_tokenizer_gives_the_training_ids(tmp_path, filler):
    from transformers import PreTrainedTokenizerFast

    tok.write_tokenizer(tmp_path)
    served = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for sample in some_of_everything(filler):
        question, answer = question_and_answer(sample)
        text = served.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        assert served.encode(text, add_special_tokens=False) == sample.prompt_ids
        assert served.encode(answer, add_special_tokens=False) == sample.answer_ids[:-1]
        assert served.decode(sample.prompt_ids) == text
        assert served.decode(sample.answer_ids, skip_special_tokens=True) == answer
    assert len(served) == tok.EMBEDDING_ROWS


def test_any_text_survives_the_tokenizer():
    text = "Zürich 42 -- hello,\n\n  \tdéjà vu 🙂 <|eot_id|>"
    assert tok.decode(tok.encode(text)) == text


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("needles", [1, 8])
def test_the_needle_stands_at_the_depth_asked_for(filler, depth, needles):
    rng = np.random.default_rng(3)
    for _ in range(10):
        sample = recall(rng, filler, 512, needles=needles, depth=depth)
        assert len(sample.prompt_ids) == 512
        ((start, end),) = sample.needle_spans
        name, code = re.match(r" (\w+) is (\d+)\.", tok.decode(sample.answer_ids)).groups()
        assert tok.decode(sample.prompt_ids[start:end]) == f" The code of {name} is {code}."
        slack = 0.03 + 14 * needles / 512  # a sentence boundary, and needles are no filler
        assert abs(start / (512 - 30) - depth) < slack
        assert question_and_answer(sample)[0].endswith(f"\nWhat is the code of {name}?")


def test_several_needles_are_asked_for_and_answered_in_order(filler):
    sample = recall(np.random.default_rng(4), filler, 300, needles=8, queried=4)
    question, answer = question_and_answer(sample)
    pairs = re.findall(r"(\w+) is (\d{5})", answer)
    assert len(pairs) == len(sample.needle_spans) == 4
    for (name, code), (start, end) in zip(pairs, sample.needle_spans, strict=False):
        assert tok.decode(sample.prompt_ids[start:end]) == f" The code of {name} is {code}."
    assert re.search(r"What are the codes of (.*)\?$", question).group(1).replace(" and ", ", ").split(", ") == [
        name for name, _ in pairs
    ]
    assert len(re.findall(r"The code of", question)) == 8


def test_a_removed_needle_is_nowhere_in_the_prompt(filler):
    sample = recall(np.random.default_rng(6), filler, 512, needles=4, omit=True)
    question, answer = question_and_answer(sample)
    name, code = re.match(r" (\w+) is (\d+)\.", answer).groups()
    assert len(sample.prompt_ids) == 512 and not sample.needle_spans
    assert code not in question and f"code of {name} is" not in question
    assert len(re.findall(r"The code of", question)) == 3


def test_needles_that_do_not_fit_are_refused(filler):
    with pytest.raises(ValueError, match="do not fit"):
        recall(np.random.default_rng(0), filler, 64, needles=16)


def followed(question):
    arrows = dict(re.findall(r" (\w) (\w),", question))
    chain = [question.split("from ")[1]]
    while chain[-1] in arrows:
        chain.append(arrows[chain[-1]])
    return chain


SOLUTIONS = {
    "copy": lambda q: q.split()[1:],
    "reverse": lambda q: q.split()[:0:-1],
    "sort": lambda q: sorted(q.split()[1:]),
    "add": lambda q: [str(sum(map(int, re.findall(r"\d+", q))))],
    "totals": lambda q: [str(t) for t in accumulate(map(int, q.split()[1:]))],
    "follow": followed,
}


@pytest.mark.parametrize("task", SMALL_TASKS)
def test_the_small_tasks_answers_are_right(task):
    rng = np.random.default_rng(8)
    for _ in range(50):
        question, answer = question_and_answer(SMALL_TASKS[task](rng))
        assert answer.split() == SOLUTIONS[task](question), question


@pytest.mark.parametrize("tokens", [12, 30, 250, 512])
def test_a_walk_goes_along_its_arrows(tokens):
    sample = walk(np.random.default_rng(tokens), words_of(tokens))
    question, answer = question_and_answer(sample)
    arrows = dict(re.findall(r" (\w+)> ?(\w+|\.);", question))
    path = [question.split("from ")[1]]
    while arrows[path[-1]] != ".":
        path.append(arrows[path[-1]])
    assert answer == "".join(f" {word}>" for word in path) + "." and len(path) == len(arrows)
    assert len(sample.answer_ids) == min(tokens, 250)


def test_a_seed_fixes_the_prompts(filler):
    def draw():
        rng = np.random.default_rng(9)
        return [recall(rng, filler, 128, needles=3).prompt_ids, SMALL_TASKS["sort"](rng).prompt_ids]

    assert draw() == draw()
