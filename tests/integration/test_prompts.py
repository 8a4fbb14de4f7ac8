"""Masks that a client typed are text and cost nothing; masks among token ids, or asked for, are holes to fill."""

import pytest
from vllm import SamplingParams

from tests.integration.serving import CHECKPOINT, chat, chat_text

#: checkpoint -> its mask token
MASKS = {str(CHECKPOINT): "<|mdm_mask|>", "dream-tiny": "<|mask|>"}
COUNT = 12


@pytest.fixture(params=MASKS, ids=["llada", "dream"])
def llm(engines, request):
    settings = {"max_model_len": 512} if request.param == str(CHECKPOINT) else {}
    return engines(request.param, **settings)


@pytest.fixture
def mask(llm) -> tuple[int, str]:
    config = llm.model_config.hf_config
    (text,) = (text for text in MASKS.values() if llm.get_tokenizer().encode(text) == [config.mask_token_id])
    return config.mask_token_id, text


def answered(llm, prompt, **options):
    """(the finished request, steps the engine took for it)"""
    # with a threshold nothing reaches, LLaDA spends a step on a hole as Dream does
    options = {"dlm_threshold": 1.0} | options
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, extra_args=options)
    (prompt,) = llm._preprocess_cmpl([prompt])
    llm.llm_engine.add_request("r", prompt, params)
    steps, outputs = 0, []
    while llm.llm_engine.has_unfinished_requests():
        outputs += llm.llm_engine.step()
        steps += 1
    return outputs[-1], steps


def test_typed_masks_are_text(llm, mask):
    mask_id, literal = mask
    typed = f"Copy: {literal * COUNT} a{literal}"
    output, steps = answered(llm, typed)
    assert mask_id not in output.prompt_token_ids
    assert llm.get_tokenizer().decode(output.prompt_token_ids) == typed == output.prompt
    assert steps == 1 and len(output.outputs[0].token_ids) == 1


def test_masks_are_holes_when_asked_for_and_among_ids(llm, mask):
    mask_id, literal = mask
    typed = f"Copy: {literal * COUNT} a"
    asked, asked_steps = answered(llm, typed, dlm_infill=1)
    ids = asked.prompt_token_ids
    assert ids.count(mask_id) == COUNT and asked_steps > 1
    written, written_steps = answered(llm, {"prompt_token_ids": ids})
    assert written.prompt_token_ids == ids and written_steps == asked_steps
    assert written.outputs[0].token_ids == asked.outputs[0].token_ids
    text, text_steps = answered(llm, {"prompt_token_ids": ids}, dlm_infill=0)
    assert mask_id not in text.prompt_token_ids and text_steps == 1
    assert llm.get_tokenizer().decode(text.prompt_token_ids) == typed


def test_a_chat_keeps_its_templates_tokens_and_none_of_the_users(engines):
    llm = engines(str(CHECKPOINT), max_model_len=512)
    mask_id, literal = llm.model_config.hf_config.mask_token_id, MASKS[str(CHECKPOINT)]
    (output,) = llm.chat(chat(f"Copy: {literal} a"), use_tqdm=False)
    assert llm.get_tokenizer().decode(output.prompt_token_ids) == chat_text(f"Copy: {literal} a")
    assert mask_id not in output.prompt_token_ids and 0 in output.prompt_token_ids  # the start of the template


def test_a_prompt_of_text_alone_is_text_to_the_engine_itself(engines):
    llm = engines(str(CHECKPOINT), max_model_len=512)
    mask_id, literal = llm.model_config.hf_config.mask_token_id, MASKS[str(CHECKPOINT)]
    process = llm.llm_engine.input_processor.process_inputs
    for prompt in (literal, {"prompt": literal}):
        request = process("r", prompt, SamplingParams(max_tokens=1), llm.supported_tasks)
        assert mask_id not in request.prompt_token_ids
    request = process("r", {"prompt_token_ids": [mask_id]}, SamplingParams(max_tokens=1), llm.supported_tasks)
    assert request.prompt_token_ids == [mask_id]


def test_what_typed_masks_become_counts_for_the_length(engines):
    llm = engines(str(CHECKPOINT), max_model_len=512)
    with pytest.raises(ValueError, match=r"max_tokens.*a prompt of .* leaves no room"):
        llm.generate(MASKS[str(CHECKPOINT)] * 500, SamplingParams(max_tokens=1), use_tqdm=False)


# -- the canvas of a request that names none ---------------------------------------------------


def test_the_default_canvas_is_the_checkpoints_or_the_familys(engines):
    llm = engines(str(CHECKPOINT), max_model_len=512)
    assert llm.get_default_sampling_params().max_tokens == 32  # its generation_config.json
    assert engines("dream-tiny").get_default_sampling_params().max_tokens == 256
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    (output,) = llm.generate("Copy: a", params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 32
    (short,) = engines("dream-tiny").generate({"prompt_token_ids": [7] * 250}, params, use_tqdm=False)
    assert len(short.outputs[0].token_ids) == 6  # cut to the model's length


def test_the_default_canvas_does_not_bound_larger_requests(engines):
    llm = engines(str(CHECKPOINT), max_model_len=512)
    (output,) = llm.generate("Copy: a", SamplingParams(temperature=0, max_tokens=40, ignore_eos=True), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 40
