"""What cannot be honoured is answered with 400 and the name of the field, and harms nobody else."""

import httpx
import openai
import pytest

from tests.integration.serving import COPIED, COPY, chat, chat_text, needle, options

SCHEMA = {"type": "json_schema", "json_schema": {"name": "any", "schema": {"type": "object"}}}

#: id -> (body of a completion of 16 tokens, what the message must name)
COMPLETIONS = {
    # dlm_*
    "unknown option": (options(dlm_stepz=3), "dlm_stepz"),
    "no steps": (options(dlm_steps=0), "dlm_steps"),
    "negative steps": (options(dlm_steps=-1), "dlm_steps"),
    "steps in words": (options(dlm_steps="many"), "dlm_steps"),
    "half a step": (options(dlm_steps=2.5), "dlm_steps"),
    "a list of steps": (options(dlm_steps=[4, 8]), "dlm_steps"),
    "an object of steps": (options(dlm_steps={"first": 4}), "dlm_steps"),
    "steps null": (options(dlm_steps=None), "dlm_steps"),
    "fewer steps than blocks": (options(dlm_steps=1), "dlm_steps"),
    "steps without end": (options(dlm_steps=10**9), "dlm_steps"),
    "empty blocks": (options(dlm_block_length=0), "dlm_block_length"),
    "unknown algorithm": (options(dlm_decoding="nope"), "dlm_decoding"),
    "a number for an algorithm": (options(dlm_decoding=3), "dlm_decoding"),
    "an old name": (options(dlm_algorithm="nope"), "dlm_algorithm"),
    "an old name and another value": (options(dlm_algorithm="random", dlm_decoding="entropy"), "dlm_decoding"),
    "a list of algorithms": (options(dlm_decoding=["random"]), "dlm_decoding"),
    "unknown reuse": (options(dlm_reuse="nope"), "dlm_reuse"),
    "unknown selection": (options(dlm_selection="nope"), "dlm_selection"),
    "negative threshold": (options(dlm_threshold=-1), "dlm_threshold"),
    "threshold above certainty": (options(dlm_threshold=1.01), "dlm_threshold"),
    "Dream's option": (options(dlm_top_p=0.9), "dlm_top_p"),
    "top_p of zero": (options(dlm_decoding="entropy", dlm_top_p=0), "dlm_top_p"),
    "half an infill": (options(dlm_infill=0.5), "dlm_infill"),
    "an option without its prefix": (options(threshold=0.9), "write dlm_threshold"),
    "infill without its prefix": (options(infill=1), "write dlm_infill"),
    "an option nobody reads": (options(temprature=0.9), "temprature"),
    "an option in the body": (
        {"dlm_threshold": 0.9},
        'dlm_threshold: 0.9 is not supported: write it into "vllm_xargs"',
    ),
    "an unknown option in the body": ({"dlm_stepz": 1}, "vllm_xargs"),
    "KV transfer": ({"kv_transfer_params": {"do_remote_decode": True}}, "kv_transfer_params"),
    "longest canvas": ({"max_tokens": 401}, "max_tokens: 401 is not supported: the maximum canvas of this server"),
    "threshold in words": (options(dlm_threshold="NaN"), "dlm_threshold"),
    "threshold for a random order": (options(dlm_decoding="random", dlm_threshold=0.5), "dlm_threshold"),
    "factor of zero": (options(dlm_factor=0), "dlm_factor"),
    "threshold and factor": (options(dlm_threshold=0.9, dlm_factor=1.0), "dlm_factor"),
    "negative guidance": (options(dlm_cfg_scale=-1), "dlm_cfg_scale"),
    "guidance beyond numbers": (options(dlm_cfg_scale=1e308), "dlm_cfg_scale"),
    "another algorithm's option": (options(dlm_eps=0.1), "dlm_eps"),
    "eps of two": (options(dlm_decoding="entropy", dlm_eps=2), "dlm_eps"),
    "ranking where there is none": (
        options(dlm_decoding="origin", dlm_algorithm_temperature=1),
        "dlm_algorithm_temperature",
    ),
    "a boolean of two": (options(dlm_suppress_eos=2), "dlm_suppress_eos"),
    "a boolean in words": (options(dlm_confidence_eos_eot_inf="yes"), "dlm_confidence_eos_eot_inf"),
    "vLLM's own diffusion option": (options(diffusion_max_steps=4), "diffusion_max_steps"),
    # what denoising does not implement
    "presence penalty": ({"presence_penalty": 0.5}, "presence_penalty"),
    "frequency penalty": ({"frequency_penalty": 0.5}, "frequency_penalty"),
    "repetition penalty": ({"repetition_penalty": 1.1}, "repetition_penalty"),
    "min_p": ({"min_p": 0.1, "temperature": 1}, "min_p"),
    "min_tokens": ({"min_tokens": 2}, "min_tokens"),
    "logit bias": ({"logit_bias": {"7": 1}}, "logit_bias"),
    "allowed tokens": ({"allowed_token_ids": [7]}, "allowed_token_ids"),
    "bad words": ({"bad_words": ["boat"]}, "bad_words"),
    "a regular expression": ({"structured_outputs": {"regex": "a+"}}, "structured_outputs"),
    "a choice": ({"structured_outputs": {"choice": ["a", "b"]}}, "structured_outputs"),
    "JSON": ({"response_format": {"type": "json_object"}}, "response_format"),
    "a JSON schema": ({"response_format": SCHEMA}, "response_format"),
    "prompt logprobs": ({"prompt_logprobs": 1}, "prompt_logprobs"),
    "echo with logprobs": ({"echo": True, "logprobs": 1}, "echo"),
    "logprobs of given tokens": ({"logprob_token_ids": [7], "logprobs": 1}, "logprob_token_ids"),
    "beam search": ({"use_beam_search": True, "n": 2}, "use_beam_search"),
    # vLLM's own bounds
    "prompt too long": ({"prompt": "a" * 5000}, "input"),
    "negative max_tokens": ({"max_tokens": -1}, "max_tokens"),
    "negative temperature": ({"temperature": -1}, "temperature"),
    "temperature in words": ({"temperature": "NaN"}, "temperature"),
    "a list of temperatures": ({"temperature": [0, 1]}, "temperature"),
    "top_p of two": ({"top_p": 2}, "top_p"),
    "negative top_k": ({"top_k": -2}, "top_k"),
    "too many logprobs": ({"logprobs": 10_000}, "logprobs"),
    "seed in words": ({"seed": "lucky"}, "seed"),
    "stop token outside the vocabulary": ({"stop_token_ids": [1 << 20]}, "stop_token_ids"),
    "empty prompt": ({"prompt": ""}, "prompt"),
}

CHATS = {
    "unknown option": (options(dlm_stepz=3), "dlm_stepz"),
    "no steps": (options(dlm_steps=0), "dlm_steps"),
    "presence penalty": ({"presence_penalty": 0.5}, "presence_penalty"),
    "JSON": ({"response_format": {"type": "json_object"}}, "response_format"),
    "beam search": ({"use_beam_search": True, "n": 2}, "use_beam_search"),
    "an option in the body": ({"dlm_threshold": 0.9}, "vllm_xargs"),
    "an option without its prefix": (options(steps=4), "write dlm_steps"),
    "longest canvas": ({"max_completion_tokens": 401}, "400"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs"),
    "too many top_logprobs": ({"logprobs": True, "top_logprobs": 99}, "logprobs"),
    "prompt too long": ({"messages": chat("a" * 5000)}, "input"),
    "an empty canvas": ({"max_tokens": 0}, "max_tokens"),
}


def check(error: openai.BadRequestError, field: str) -> None:
    assert error.status_code == 400
    message = error.body["message"]
    assert field in message, message
    assert len(message) < 1500


@pytest.mark.parametrize(("body", "field"), COMPLETIONS.values(), ids=COMPLETIONS)
def test_a_completion_that_cannot_be_honoured(client, model, body, field):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=model, prompt="Copy: a", max_tokens=16, extra_body=body)
    check(refused.value, field)


@pytest.mark.parametrize(("body", "field"), CHATS.values(), ids=CHATS)
def test_a_chat_that_cannot_be_honoured(client, model, body, field):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=model, messages=chat(COPY), max_tokens=16, extra_body=body)
    check(refused.value, field)


@pytest.mark.parametrize("name", ["no steps", "presence penalty", "logit bias", "JSON", "fewer steps than blocks"])
def test_a_stream_is_refused_before_it_begins(client, model, name):
    body, field = COMPLETIONS[name]
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=model, prompt="Copy: a", max_tokens=16, stream=True, extra_body=body)
    check(refused.value, field)


RESPONSES = {
    "unknown option": (options(dlm_stepz=3), "dlm_stepz"),
    "no steps": (options(dlm_steps=0), "dlm_steps"),
    "an option in the body": ({"dlm_threshold": 0.9}, "vllm_xargs"),
    "longest canvas": ({"max_output_tokens": 401}, "400"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("body", "field"), RESPONSES.values(), ids=RESPONSES)
def test_a_response_that_cannot_be_honoured(client, model, body, field, stream):
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model=model, input=COPY, stream=stream, extra_body={"max_output_tokens": 16} | body)
    check(refused.value, field)


LONG = [pytest.param("dlm_" + "z" * 10**6, id="long option"), pytest.param("y" * 10**6, id="long name")]


@pytest.mark.parametrize("field", ["dlm_steps", "dlm_threshold", "dlm_reuse", "threshold", *LONG])
@pytest.mark.parametrize("place", ["vllm_xargs", "body"])
def test_a_long_wrong_value_does_not_come_back(client, model, field, place):
    given = {field: "x" * 10**7}
    extra = {"vllm_xargs": given} if place == "vllm_xargs" else given
    asked = {"model": model, "prompt": "Copy: a", "extra_body": extra}
    if place == "body" and not field.startswith("dlm_"):  # OpenAI's bodies may have other fields
        assert client.completions.create(**asked).choices
        return
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**asked)
    answer = refused.value.response.text
    assert field[:50] in answer and len(answer) < 1500


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_have(server, model, number):
    """Python's parser accepts them, so they arrive, though no client writes them."""
    body = f'{{"model": "{model}", "prompt": "Copy: a", "vllm_xargs": {{"dlm_cfg_scale": {number}}}}}'
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers, timeout=60, trust_env=False)
    assert answer.status_code == 400
    assert "dlm_cfg_scale" in answer.json()["error"]["message"]


def sampled(**fields) -> dict:
    return {"temperature": 1, "seed": 7} | fields


ENTROPY = options(dlm_decoding="entropy")


def certain(**values) -> dict:
    """A greedy answer whose tokens are far more probable than any others. In bfloat16, two tokens of less certain
    answers may be equally probable on some CPU."""
    return {"prompt": chat_text(COPY), "temperature": 0} | options(dlm_suppress_eos=0, **values)


#: id -> (a request, another that must be answered alike, how many tokens its prompt comes to), None: never mind
UNUSUAL = {
    "negative seed": (sampled(seed=-5), sampled(seed=2**63 - 5), None),
    "smallest seed": (sampled(seed=-(2**63)), sampled(seed=0), None),
    "largest seed and three samples": (sampled(seed=2**63 - 1, n=3), sampled(seed=2**63 - 1, n=3), None),
    "huge top_k": (sampled(top_k=2**63) | ENTROPY, sampled() | ENTROPY, None),
    "tiny temperature": (certain() | {"temperature": 1e-9}, certain(), None),
    "tiny top_p": (certain() | {"temperature": 2, "seed": 7, "top_p": 1e-9}, certain(), None),
    "top_k of one": (certain() | {"temperature": 2, "seed": 7, "top_k": 1}, certain(), None),
    "tiny top_p of Dream's": (
        certain(dlm_decoding="entropy") | {"temperature": 2, "seed": 7, "top_p": 1e-9},
        certain(dlm_decoding="entropy", dlm_top_p=1e-9),
        None,
    ),
    "huge block": (options(dlm_block_length=2**40), options(dlm_block_length=16), None),
    "a block per token and most steps": (
        options(dlm_block_length=1, dlm_steps=512),
        options(dlm_block_length=1),
        None,
    ),
    "more steps than tokens in random order": (
        sampled(**options(dlm_decoding="origin", dlm_steps=512)),
        None,
        None,
    ),
    "infinite patience": (options(dlm_factor=1e300), options(dlm_threshold=0), None),
    "masks in the prompt": ({"prompt": [5, 2, 2, 6]}, {"prompt": [5, 2, 2, 6]} | options(dlm_infill=1), 4),
    "masks in the prompt as text": (
        {"prompt": [5, 2, 2, 6]} | options(dlm_infill=0),
        {"prompt": [5, 2, 2, 6]} | options(dlm_infill=False),
        2 + 2 * len("<|mdm_mask|>"),
    ),
    "nothing in particular": (
        options(dlm_threshold="none", dlm_steps="none", dlm_factor="none", dlm_infill="none"),
        {},
        None,
    ),
    "no stop tokens": ({"stop_token_ids": []}, {}, None),
}


@pytest.mark.parametrize(("body", "like", "prompt"), UNUSUAL.values(), ids=UNUSUAL)
def test_the_unusual_is_served(client, model, body, like, prompt):
    """Values that once reached the engine and ended it, or might: they are obeyed."""

    def answer(body: dict):
        body = {"prompt": "What", "ignore_eos": True, "return_token_ids": True} | body
        body["vllm_xargs"] = {"dlm_suppress_eos": 1} | body.get("vllm_xargs", {})
        return client.completions.create(model=model, max_tokens=16, extra_body=body, prompt=body["prompt"])

    given = answer(body)
    tokens = [choice.token_ids for choice in given.choices]
    assert like is None or tokens == [choice.token_ids for choice in answer(like).choices]
    assert [len(ids) for ids in tokens] == [16] * body.get("n", 1)
    assert prompt in (None, given.usage.prompt_tokens)


def test_a_seed_decides(client, model):
    """Else the seeds above would say little."""
    body = {"ignore_eos": True, "return_token_ids": True} | options(dlm_suppress_eos=1)
    answers = {
        tuple(choice.token_ids)
        for seed in (-5, 0, 7)
        for choice in client.completions.create(
            model=model, prompt="What", max_tokens=16, extra_body=body | sampled(seed=seed)
        ).choices
    }
    assert len(answers) == 3


@pytest.mark.parametrize("question, answer", [(COPY, COPIED), needle()], ids=["copy", "needle"])
def test_after_all_of_them_the_server_still_answers(client, model, question, answer):
    chat_answer = client.chat.completions.create(model=model, messages=chat(question), max_tokens=16)
    assert chat_answer.choices[0].message.content == answer
