"""One server over real HTTP, asked with the `openai` client."""

import json
import math
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.integration.conftest import BLOCK
from tests.integration.serving import (
    CHECKPOINT,
    COPIED,
    COPY,
    chat,
    chat_text,
    needle,
    vllm_command,
    vllm_environment,
)
from vllm_dlm.methods import methods

EOS = 1  # of the bundled checkpoint, as is the padding behind an answer


@pytest.fixture
def complete(client, model):
    """complete(prompt, **fields): fields that `openai` does not know go into the body."""

    def create(prompt, max_tokens: int = 16, extra: dict | None = None, **fields):
        return client.completions.create(
            model=model, prompt=prompt, max_tokens=max_tokens, extra_body=extra, **fields
        )

    return create


@pytest.fixture
def ask(client, model):
    def create(question: str, max_tokens: int | openai.Omit = 16, extra: dict | None = None, **fields):
        return client.chat.completions.create(
            model=model, messages=chat(question), max_tokens=max_tokens, extra_body=extra, **fields
        )

    return create


@pytest.fixture
def counted(server):
    """Counts of the `vllm:diffusion_*` counters while a function ran. No other test may use the server meanwhile."""

    def count(function):
        before = server.metrics()
        result = function()
        after = server.metrics()
        names = ("denoising_steps", "canvas_positions", "committed_tokens", "rows_recomputed")
        full = {name: f"vllm:diffusion_num_{name}_total" for name in names}
        return result, {name: after[full[name]] - before[full[name]] for name in names}

    return count


def options(**values) -> dict:
    return {"vllm_xargs": values}


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


def test_a_prompt_may_be_token_ids(client, complete, server, model):
    text = complete(chat_text(COPY), extra={"return_token_ids": True}).choices[0]
    ids = complete(text.prompt_token_ids, extra={"return_token_ids": True}).choices[0]
    assert ids.text == COPIED and ids.token_ids == text.token_ids


def test_ignoring_the_end_gives_exactly_max_tokens(complete):
    answer = complete(chat_text(COPY), max_tokens=21, extra={"ignore_eos": True})
    assert answer.usage.completion_tokens == 21
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text.startswith(COPIED)


def test_without_max_tokens_the_canvas_reaches_to_the_model_length(ask):
    question, answer = needle(repeats=10)
    chat = ask(question, max_tokens=openai.omit, extra={"ignore_eos": True})
    assert chat.usage.total_tokens == 512
    assert chat.choices[0].finish_reason == "length"


def test_max_tokens_is_cut_to_the_model_length(ask):
    question, answer = needle(repeats=11)
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
            question, stream=True, stream_options={"include_usage": True}, extra=extra | {"return_token_ids": True}
        )
    )
    assert chunks[-1].usage == whole.usage
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content == answer
    assert choices[-1].finish_reason == "stop"
    counts = [len(choice.token_ids) for choice in choices if choice.token_ids]
    assert sum(counts) == whole.usage.completion_tokens == 9
    # One chunk per block; only a client that falls behind gets several blocks at once.
    assert all(count % width == 0 for count in counts[:-1])
    if width < 9:
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
    assert len(tokens) == 9
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
    assert [len(entry.top_logprobs) for entry in five.logprobs.content] == [5] * 9
    for a, b in zip(two.logprobs.content, five.logprobs.content, strict=True):
        assert a.token == b.token and a.logprob == pytest.approx(b.logprob, abs=0.05)  # bfloat16


# -- sampling --------------------------------------------------------------------------------


def test_decoding_is_greedy_unless_asked(complete):
    prompt = "What is the color of the boat?"
    default = [complete(prompt, extra={"ignore_eos": True}, seed=seed).choices[0].text for seed in (1, 2)]
    greedy = complete(prompt, extra={"ignore_eos": True}, temperature=0).choices[0].text
    assert default == [greedy, greedy]


def test_n_samples_differ_and_a_seed_brings_them_back(complete):
    def sample(seed, temperature=1.0):
        answer = complete("The", 24, {"ignore_eos": True, "return_token_ids": True}, n=3, seed=seed,
                          temperature=temperature)
        return [tuple(choice.token_ids) for choice in sorted(answer.choices, key=lambda choice: choice.index)]

    first = sample(seed=5)
    assert len(set(first)) == 3
    assert sample(seed=5) == first
    assert set(sample(seed=600)).isdisjoint(first)
    assert len(set(sample(seed=5, temperature=0))) == 1


def test_without_a_seed_samples_differ(complete):
    answers = {complete("The", 24, {"ignore_eos": True}, temperature=2.0).choices[0].text for _ in range(3)}
    assert len(answers) == 3


# -- dlm_* -----------------------------------------------------------------------------------


def test_steps_are_the_requests_own(complete, counted):
    """`vllm:diffusion_num_denoising_steps` has one more per block, vLLM's step that commits it."""
    prompt, ends = chat_text(COPY), {"ignore_eos": True}
    rows = complete(prompt, 1).usage.prompt_tokens + 16
    for extra, forwards, blocks in [
        ({}, 16, 2),
        (options(dlm_steps=4), 4, 2),
        (options(dlm_block_length=16, dlm_steps=5), 5, 1),
        (options(dlm_block_length=5), 16, 4),
    ]:
        answer, counts = counted(lambda: complete(prompt, 16, ends | extra))
        assert counts["committed_tokens"] == answer.usage.completion_tokens == 16
        assert counts["denoising_steps"] == forwards + blocks
        assert counts["rows_recomputed"] == forwards * rows


def test_a_threshold_takes_fewer_steps_to_the_same_answer(ask, counted):
    question, answer = needle()
    for threshold, steps in [(2.0, 9), (0.5, None)]:
        chat, counts = counted(lambda: ask(question, extra=options(dlm_threshold=threshold)))
        assert chat.choices[0].message.content == answer
        forwards = counts["denoising_steps"] - 2  # the blocks of this answer
        assert forwards >= 9 if steps else forwards < 9


def test_guidance_doubles_the_rows(complete, counted):
    prompt, extra = chat_text(COPY), {"ignore_eos": True}
    _, plain = counted(lambda: complete(prompt, 8, extra))
    _, guided = counted(lambda: complete(prompt, 8, extra | options(dlm_cfg_scale=0.5)))
    assert guided["rows_recomputed"] == 2 * plain["rows_recomputed"]
    assert guided["denoising_steps"] == plain["denoising_steps"]


@pytest.mark.parametrize("true", [True, 1])
def test_booleans_may_be_0_and_1(complete, true):
    extra = {"ignore_eos": True, "return_token_ids": True}
    padded = complete(chat_text(COPY), extra=extra).choices[0].token_ids
    suppressed = complete(chat_text(COPY), extra=extra | options(dlm_suppress_eos=true)).choices[0].token_ids
    unchanged = complete(chat_text(COPY), extra=extra | options(dlm_suppress_eos=0)).choices[0].token_ids
    assert EOS in padded and EOS not in suppressed and unchanged == padded


@pytest.mark.parametrize("algorithm", sorted(methods("decoding")))
def test_every_decoding_algorithm_can_be_asked_for(ask, algorithm):
    answer = ask(COPY, 8, extra=options(dlm_algorithm=algorithm), seed=3)
    assert answer.choices[0].message.content == COPIED


@pytest.mark.parametrize("kind", ["reuse", "selection"])
def test_the_exact_model_can_be_asked_for(ask, kind):
    assert ask(COPY, extra=options(**{f"dlm_{kind}": "none"})).choices[0].message.content == COPIED


def test_requests_of_different_kinds_share_a_batch(ask):
    kinds = [
        options(dlm_steps=8),
        options(dlm_block_length=4),
        options(dlm_algorithm="entropy", dlm_eps=0.01),
        options(dlm_algorithm="topk_margin", dlm_block_length=16),
        options(dlm_threshold=0.9),
        options(dlm_factor=1.0),
        options(dlm_algorithm="maskgit_plus", dlm_threshold=0.9),
        {},
    ]
    pairs = [(needle("bob", f"{10007 * (i + 3)}", 1 + i % 4), kind) for i, kind in enumerate(kinds * 2)]
    with ThreadPoolExecutor(len(pairs)) as pool:
        jobs = [pool.submit(ask, question, extra=kind) for (question, _), kind in pairs]
        answers = [job.result().choices[0].message.content for job in jobs]
    assert answers == [answer for (_, answer), _ in pairs]


# -- clients that go away --------------------------------------------------------------------


def test_streams_closed_halfway_leave_nothing_behind(server, client, model, complete, ask):
    """Some of the requests are running, some still wait for memory, when their clients go."""
    before = server.metrics()["vllm:generation_tokens_total"]
    fields = {"model": model, "prompt": "The", "stream": True, "extra_body": {"ignore_eos": True}}
    leaving = openai.OpenAI(base_url=client.base_url, api_key="none", timeout=120, max_retries=0)
    streams = [leaving.completions.create(max_tokens=500, **fields) for _ in range(8)]
    streams += [client.completions.create(max_tokens=500, **fields) for _ in range(8)]
    assert next(iter(streams[0])).choices and next(iter(streams[8])).choices
    assert server.metrics()["vllm:num_requests_running"] > 0
    for stream in streams[8:]:
        for _ in stream:
            break
        stream.close()
    leaving.close()
    question, answer = needle()
    assert ask(question).choices[0].message.content == answer
    assert complete(chat_text(COPY)).choices[0].text == COPIED
    deadline = time.monotonic() + 60
    while (metrics := server.metrics())["vllm:num_requests_running"] + metrics["vllm:num_requests_waiting"]:
        assert time.monotonic() < deadline, "aborted requests are still there"
        time.sleep(0.2)
    assert metrics["vllm:generation_tokens_total"] - before < 16 * 500 / 2
    assert metrics["vllm:kv_cache_usage_perc"] == 0


# -- counters --------------------------------------------------------------------------------


def test_counters_agree_with_what_was_delivered(server, ask, counted):
    delivered = server.metrics()["vllm:generation_tokens_total"]
    questions = [needle("carol", f"{31 * i + 20000}", 1 + i % 3)[0] for i in range(6)]

    def ask_all():
        with ThreadPoolExecutor(3) as pool:
            return sum(answer.usage.completion_tokens for answer in pool.map(ask, questions))

    tokens, counts = counted(ask_all)
    assert counts["committed_tokens"] == tokens
    assert server.metrics()["vllm:generation_tokens_total"] - delivered == tokens
    assert counts["denoising_steps"] >= tokens  # one token per step, and the commits
    assert counts["canvas_positions"] == counts["denoising_steps"] * BLOCK
    assert counts["rows_recomputed"] > counts["canvas_positions"]


def test_vllms_benchmark_reports_diffusion(server, tmp_path):
    prompts, tokens = 12, 32
    command = vllm_command(
        *("bench", "serve", "--base-url", server.url, "--model", str(CHECKPOINT), "--disable-tqdm"),
        *("--dataset-name", "random", "--random-input-len", "32", "--random-output-len", str(tokens)),
        *("--num-prompts", str(prompts), "--max-concurrency", "4", "--ignore-eos"),
        *("--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"),
    )
    run = subprocess.run(command, env=vllm_environment(), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "iffusion" in run.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] == prompts and result["failed"] == 0
    assert result["total_output_tokens"] == prompts * tokens
    assert result["diffusion_committed_tokens"] == prompts * tokens
    # Every block of 8 takes 8 steps of one token each; the steps that commit are taken off.
    assert result["diffusion_steps_per_canvas"] == pytest.approx(BLOCK)
    assert result["diffusion_committed_per_step"] == pytest.approx(1)
    assert result["diffusion_denoising_steps"] == prompts * tokens
    assert result["diffusion_canvas_positions"] == prompts * tokens * (BLOCK + 1)
