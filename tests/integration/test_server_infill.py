"""A text on both sides of the canvas, over HTTP."""

import httpx
import openai
import pytest

from tests.integration.serving import CHECKPOINT, chat, options

PROMPT, SUFFIX = "Remember the codes. The code of", " is 48213. What is the code of alice?"
BODY = {"ignore_eos": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def wanted(engines):
    """wanted(token ids of the prompt, suffix) -> those of the answer, from an engine in this process"""
    from vllm import SamplingParams

    def wanted(prompt: list[int], suffix: str) -> list[int]:
        llm = engines(str(CHECKPOINT), max_model_len=512, dtype="auto")
        params = SamplingParams(
            temperature=0, max_tokens=8, ignore_eos=True, extra_args={"dlm_suffix": suffix, "dlm_block_length": 4}
        )
        (output,) = llm.generate([{"prompt_token_ids": prompt}], [params], use_tqdm=False)
        return list(output.outputs[0].token_ids)

    return wanted


def test_completions(complete, wanted):
    asked = options(dlm_block_length=4)
    answer = complete(PROMPT, 8, BODY | asked, suffix=SUFFIX)
    (choice,) = answer.choices
    prompt = complete(PROMPT, 1, BODY).choices[0].prompt_token_ids
    assert choice.token_ids == wanted(prompt, SUFFIX)
    assert SUFFIX not in choice.text and answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens == len(choice.prompt_token_ids) > len(prompt)
    assert choice.token_ids != complete(PROMPT, 8, BODY | asked).choices[0].token_ids
    same = complete(PROMPT, 8, BODY | options(dlm_block_length=4, dlm_suffix=SUFFIX))
    assert same.choices[0].token_ids == choice.token_ids
    pieces = list(complete(PROMPT, 8, BODY | asked, suffix=SUFFIX, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == choice.text
    assert len([piece for piece in pieces if piece.choices[0].text]) >= 2  # canvas blocks
    echoed = complete(PROMPT, 8, {"ignore_eos": True} | asked, suffix=SUFFIX, echo=True)
    assert echoed.choices[0].text == PROMPT + choice.text


def test_chats(ask, wanted):
    extra = BODY | options(dlm_suffix=SUFFIX, dlm_block_length=4)
    answer = ask(PROMPT, 8, extra)
    behind = len(answer.prompt_token_ids) - len(ask(PROMPT, 1, BODY).prompt_token_ids)
    assert behind > 0 and answer.usage.prompt_tokens == len(answer.prompt_token_ids)
    (choice,) = answer.choices
    assert choice.token_ids == wanted(answer.prompt_token_ids[:-behind], SUFFIX)
    pieces = list(ask(PROMPT, 8, extra, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == choice.message.content


def test_samples_stop_and_logprobs(complete):
    extra = options(dlm_block_length=4) | {"ignore_eos": True}
    answer = complete(PROMPT, 8, extra, suffix=SUFFIX, n=2, temperature=1.5, seed=3, logprobs=1)
    assert len({choice.text for choice in answer.choices}) == 2
    assert all(len(choice.logprobs.token_logprobs) == 8 for choice in answer.choices)
    text = answer.choices[0].text
    stopped = complete(PROMPT, 8, extra, suffix=SUFFIX, n=2, temperature=1.5, seed=3, stop=[text[2:4]]).choices[0]
    assert stopped.finish_reason == "stop" and stopped.text == text[: text.index(text[2:4])]


def test_an_empty_suffix_is_none(complete):
    plain = complete(PROMPT, 8, BODY)
    empty = complete(PROMPT, 8, BODY, suffix="")
    assert (empty.choices[0].token_ids, empty.usage) == (plain.choices[0].token_ids, plain.usage)


def test_masks_in_a_suffix_are_text(complete):
    answer = complete(PROMPT, 2, BODY, suffix="<|mdm_mask|>")
    assert 2 not in answer.choices[0].prompt_token_ids


REFUSED = {
    "a number": (options(dlm_suffix=3), "dlm_suffix: 3 is not valid, it must be str or a list of int"),
    "words among ids": (options(dlm_suffix=[5, "a"]), "dlm_suffix"),
    "no token": (options(dlm_suffix=[5, 512]), "dlm_suffix: 512 is not supported: token ids must be between 0 and 511"),
    "no token at all": (options(dlm_suffix=[-1]), "dlm_suffix: -1 is not supported: token ids"),
    "too long": (options(dlm_suffix=" a" * 600), "dlm_suffix: ' a a"),
    "two of them": ({"suffix": "a"} | options(dlm_suffix="b"), "suffix sets the same option"),
    "a layout": (options(canvas_layout=1), "canvas_layout"),
    "a layout of ours": (options(dlm_canvas_layout="a"), "dlm_canvas_layout"),
    "in the body": ({"dlm_suffix": "a"}, 'write it into "vllm_xargs"'),
}


@pytest.mark.parametrize(("body", "says"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_refused(server, client, complete, body, says, stream):
    extra = dict(body)
    with pytest.raises(openai.BadRequestError) as refused:
        complete(PROMPT, 16, extra, stream=stream)
    assert says in str(refused.value), refused.value
    if "suffix" not in body:
        body = {"model": server.model, "messages": chat(PROMPT), "max_tokens": 16, "stream": stream} | body
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60, trust_env=False)
        assert answer.status_code == 400 and says in answer.json()["error"]["message"], answer.text
    assert complete("Copy: a", 2).choices
