"""`LLM` on the bundled checkpoint: chat, and what it refuses with a ValueError that names the field."""

import pytest
from vllm import SamplingParams
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

from tests.integration.serving import CHECKPOINT, COPIED, COPY, chat, chat_text, needle


@pytest.fixture(scope="module")
def llm(engines):
    return engines(str(CHECKPOINT), max_model_len=512)


def greedy(**fields) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=16, **fields)


def test_chat_answers_a_conversation(llm):
    questions, answers = zip(needle("bob", "90417"), needle("grace", "70365", 1), (COPY, COPIED), strict=True)
    outputs = llm.chat([chat(question) for question in questions], greedy(), use_tqdm=False)
    assert [output.outputs[0].text for output in outputs] == list(answers)
    assert all(output.outputs[0].finish_reason == "stop" for output in outputs)


def test_chat_is_greedy_without_sampling_parameters(llm):
    assert llm.get_default_sampling_params().temperature == 0
    (output,) = llm.chat(chat(COPY), use_tqdm=False)
    assert output.outputs[0].text == COPIED


def test_options_ride_in_extra_args(llm):
    params = [
        greedy(extra_args={"dlm_block_length": 4}),
        greedy(extra_args={"dlm_decoding": "entropy", "dlm_steps": 16}),
        greedy(extra_args={"dlm_threshold": 0.9, "dlm_reuse": "none", "dlm_selection": "none"}),
    ]
    outputs = llm.generate([chat_text(COPY)] * 3, params, use_tqdm=False)
    assert [output.outputs[0].text for output in outputs] == [COPIED] * 3


WRONG = {
    "dlm_stepz": {"extra_args": {"dlm_stepz": 4}},
    "dlm_steps": {"extra_args": {"dlm_steps": 0}},
    "dlm_block_length": {"extra_args": {"dlm_block_length": "8"}},
    "dlm_decoding": {"extra_args": {"dlm_decoding": "nope"}},
    "dlm_reuse": {"extra_args": {"dlm_reuse": "nope"}},
    "dlm_selection": {"extra_args": {"dlm_selection": None}},
    "dlm_threshold": {"extra_args": {"dlm_threshold": float("nan")}},
    "dlm_factor": {"extra_args": {"dlm_factor": -1}},
    "dlm_cfg_scale": {"extra_args": {"dlm_cfg_scale": float("inf")}},
    "dlm_eps": {"extra_args": {"dlm_eps": 0.1}},
    "dlm_infill": {"extra_args": {"dlm_infill": "yes"}},
    "write dlm_block_length": {"extra_args": {"block_length": 8}},
    "blocklength": {"extra_args": {"blocklength": 8}},
    "dlm_suppress_eos": {"extra_args": {"dlm_suppress_eos": 2}},
    "presence_penalty": {"presence_penalty": 0.5},
    "repetition_penalty": {"repetition_penalty": 1.2},
    "min_tokens": {"min_tokens": 3},
    "logit_bias": {"logit_bias": {7: 1.0}},
    "allowed_token_ids": {"allowed_token_ids": [7]},
    "bad_words": {"bad_words": ["boat"]},
    "structured_outputs": {"structured_outputs": StructuredOutputsParams(regex="a+")},
    "prompt_logprobs": {"prompt_logprobs": 1},
}


@pytest.mark.parametrize("field", WRONG)
def test_generate_refuses_by_name(llm, field):
    with pytest.raises(ValueError, match=field):
        llm.generate(chat_text(COPY), greedy(**WRONG[field]), use_tqdm=False)


@pytest.mark.parametrize(
    ("options", "blamed"),
    [
        ({"dlm_cfg_scale": 1, "dlm_reuse": "fast_dllm"}, "dlm_cfg_scale: 1.0 .*, 16 with dlm_cfg_scale and dlm_reuse"),
        ({"dlm_reuse": "dyllm"}, "dlm_reuse: 'dyllm' .*, 16 with dlm_reuse"),
        ({"dlm_cfg_scale": 1, "dlm_reuse": "dyllm"}, "dlm_reuse: 'dyllm' .*, 32 with dlm_cfg_scale and dlm_reuse"),
    ],
)
def test_what_does_not_fit_the_cache_is_named(engines, options, blamed):
    llm = engines("llada-tiny", block_size=32, num_gpu_blocks_override=10, max_num_batched_tokens=512)
    prompt, params = {"prompt_token_ids": [7] * 200}, SamplingParams(max_tokens=56, extra_args=options)
    with pytest.raises(ValueError, match=f"{blamed}; the cache has 9") as refused:
        llm.generate(prompt, params, use_tqdm=False)
    assert "a canvas of 256 tokens takes 8 blocks" in str(refused.value)
    assert "max_tokens" not in str(refused.value)
    llm.generate(prompt, SamplingParams(max_tokens=1, extra_args={"dlm_reuse": "fast_dllm"}), use_tqdm=False)


def test_beam_search_is_refused_by_name(llm):
    with pytest.raises(ValueError, match="use_beam_search"):
        llm.beam_search([{"prompt": COPY}], BeamSearchParams(beam_width=2, max_tokens=4))


def test_one_wrong_request_takes_its_batch_along_and_nothing_else(llm):
    params = [greedy(), greedy(extra_args={"dlm_steps": 0})]
    with pytest.raises(ValueError, match="dlm_steps"):
        llm.generate([chat_text(COPY)] * 2, params, use_tqdm=False)
    question, answer = needle()
    (output,) = llm.chat(chat(question), greedy(), use_tqdm=False)
    assert output.outputs[0].text == answer
