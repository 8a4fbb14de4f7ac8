"""One server over real HTTP, asked with the `openai` client."""

import math
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.integration.serving import COPIED, COPY, NEEDLE_TOKENS, chat_text, needle, options

# -- answers ---------------------------------------------------------------------------------


def test_a_completion_is_answered_up_to_the_end_of_turn(complete):
    answer = complete(chat_text(COPY))
    assert answer.choices[0].text == COPIED
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(COPIED.split()) + 1  # and the end of turn


def test_a_chat_is_answered(ask):
    question, answer = needle()
    chat = ask(question)
    assert chat.choices[0].message.content == answer
    assert chat.choices[0].finish_reason == "stop"
    assert 100 < chat.usage.prompt_tokens < 200
    assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens


def test_several_prompts_are_answered_in_order(complete):
    answers = complete([chat_text("Copy: c d"), chat_text("Copy: h a g"), chat_text(COPY)]).choices
    assert [choice.text for choice in answers] == [" c d", " h a g", COPIED]


def test_a_prompt_may_be_token_ids(complete):
    text = complete(chat_text(COPY), extra={"return_token_ids": True}).choices[0]
    ids = complete(text.prompt_token_ids, extra={"return_token_ids": True}).choices[0]
    assert ids.text == COPIED and ids.token_ids == text.token_ids


def test_ignoring_the_end_gives_exactly_max_tokens(complete):
    answer = complete(chat_text(COPY), max_tokens=21, extra={"ignore_eos": True})
    assert answer.usage.completion_tokens == 21
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text.startswith(COPIED)


def test_without_max_tokens_the_canvas_is_the_default(ask, complete, client, model):
    """32 tokens in this checkpoint's generation_config.json, which hold all of its answers."""
    answer = ask("Copy: d a c", max_tokens=openai.omit)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (" d a c", "stop")
    whole = ask("Copy: d a c", max_tokens=openai.omit, extra={"ignore_eos": True})
    assert whole.usage.completion_tokens == 32 and whole.choices[0].finish_reason == "length"
    response = client.responses.create(model=model, input="Copy: d a c")
    assert response.output_text == " d a c"
    assert complete("Copy: a", openai.omit, {"ignore_eos": True}).usage.completion_tokens == 16  # the API's own


def test_the_default_canvas_is_cut_to_the_model_length(ask):
    question = needle(repeats=11)[0] + " The grass is green." * 3
    chat = ask(question, max_tokens=openai.omit, extra={"ignore_eos": True})
    assert chat.usage.total_tokens == 512
    assert 0 < chat.usage.completion_tokens < 32 and chat.choices[0].finish_reason == "length"


def test_a_larger_canvas_than_the_default_can_be_asked_for(complete):
    fast = options(dlm_reuse="fast_dllm", dlm_threshold=0)
    assert complete("Copy: a", 400, {"ignore_eos": True} | fast).usage.completion_tokens == 400


def test_max_tokens_is_cut_to_the_model_length(ask):
    question, _ = needle(repeats=11)
    chat = ask(question, max_tokens=200, extra={"ignore_eos": True})
    assert chat.usage.total_tokens == 512
    assert chat.choices[0].finish_reason == "length"


# -- streams ---------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 4, 16])
def test_a_stream_delivers_whole_blocks_of_the_same_answer(ask, width):
    question, answer = needle()
    extra = options(dlm_block_length=width)
    whole = ask(question, extra=extra)
    chunks = list(
        ask(
            question,
            stream=True,
            stream_options={"include_usage": True},
            extra=extra | {"return_token_ids": True},
        )
    )
    assert chunks[-1].usage == whole.usage
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content == answer
    assert choices[-1].finish_reason == "stop"
    tokens = [getattr(choice, "token_ids", None) or [] for choice in choices]
    counts = [len(part) for part in tokens if part]
    assert sum(counts) == whole.usage.completion_tokens == NEEDLE_TOKENS
    # One chunk per block; only a client that falls behind gets several blocks at once.
    assert all(count % width == 0 for count in counts[:-1])
    if width < NEEDLE_TOKENS:
        assert len(counts) >= 2


def test_a_completion_streams_too(complete):
    chunks = list(complete(chat_text(needle()[0]), stream=True, extra=options(dlm_block_length=2)))
    text = [chunk.choices[0].text for chunk in chunks]
    assert "".join(text) == needle()[1]
    assert sum(bool(part) for part in text) >= 2


# -- where an answer ends --------------------------------------------------------------------


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_text(ask, include):
    choice = ask(needle("alice")[0], stop=["is"], extra={"include_stop_str_in_output": include}).choices[0]
    assert choice.message.content == (" alice is" if include else " alice ")
    assert choice.finish_reason == "stop"
    assert choice.stop_reason == "is"


def test_a_stop_token_ends_the_text(ask, server):
    stop = server.token_id(" is")
    answer = ask(needle("alice")[0], extra={"stop_token_ids": [stop], "return_token_ids": True})
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == stop
    assert answer.choices[0].token_ids == [server.token_id(" alice"), stop]


# -- log-probabilities -----------------------------------------------------------------------


def test_completion_logprobs_hold_the_chosen_and_the_best_tokens(complete):
    answer = complete(chat_text(needle()[0]), logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == answer.usage.completion_tokens
    for token, value, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert math.isfinite(value) and value <= 0
        assert 3 <= len(top) <= 4 and all(other <= 0 for other in top.values())
        assert top[token] == value == max(top.values())  # greedy


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs_are_sorted_and_cover_every_token(ask, stream):
    answer = ask(needle()[0], logprobs=True, top_logprobs=2, stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    tokens = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert len(tokens) == NEEDLE_TOKENS
    for entry in tokens:
        assert math.isfinite(entry.logprob) and entry.logprob <= 0
        values = [other.logprob for other in entry.top_logprobs]
        assert len(values) == 2 and values == sorted(values, reverse=True) and all(v <= 0 for v in values)


def test_logprobs_beside_a_request_without_them_are_the_same(ask):
    question = needle()[0]
    with ThreadPoolExecutor(3) as pool:
        jobs = [
            pool.submit(ask, question, logprobs=True, top_logprobs=2),
            pool.submit(ask, question),
            pool.submit(ask, question, logprobs=True, top_logprobs=5),
        ]
        two, without, five = (job.result().choices[0] for job in jobs)
    assert without.logprobs is None
    assert [len(entry.top_logprobs) for entry in five.logprobs.content] == [5] * NEEDLE_TOKENS
    for a, b in zip(two.logprobs.content, five.logprobs.content, strict=True):
        assert a.token == b.token and a.logprob == pytest.approx(b.logprob, abs=0.05)  # bfloat16


# -- sampling --------------------------------------------------------------------------------


def test_decoding_is_greedy_unless_asked(complete):
    prompt = "What is the color of the boat?"
    default = [complete(prompt, extra={"ignore_eos": True}, seed=seed).choices[0].text for seed in (1, 2)]
    greedy = complete(prompt, extra={"ignore_eos": True}, temperature=0).choices[0].text
    assert default == [greedy, greedy]


def test_n_samples_differ_and_a_seed_brings_them_back(complete):
    def sample(seed):
        extra = {"ignore_eos": True, "return_token_ids": True} | options(dlm_suppress_eos=1)
        answer = complete("What", 24, extra, n=3, seed=seed, temperature=1)
        return [tuple(choice.token_ids) for choice in sorted(answer.choices, key=lambda choice: choice.index)]

    first = sample(seed=5)
    assert len(set(first)) == 3
    assert sample(seed=5) == first
    assert set(sample(seed=600)).isdisjoint(first)


def test_without_a_seed_samples_differ(complete):
    extra = {"ignore_eos": True} | options(dlm_suppress_eos=1)
    answers = {complete("What", 24, extra, temperature=1).choices[0].text for _ in range(3)}
    assert len(answers) == 3
