"""Refuses, in the front-end, what a denoising step cannot honour, naming the field.

An error in the scheduler or a worker would end the engine for everybody, so
nothing may reach them unchecked. Read in vLLM 0.32: v1/engine/input_processor.py
(`process_inputs` sees every request of `LLM` and of the servers; a
VLLMValidationError there is answered with HTTP 400).
"""

import functools

from vllm_dlm.integration.registration import is_diffusion_lm, resolved_options
from vllm_dlm.options import OptionError, request_options

#: SamplingParams fields that change logits or order of generation in ways the denoising step does not implement
NEUTRAL = {
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_p": 0.0,
    "min_tokens": 0,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": None,
    "structured_outputs": None,
    "prompt_logprobs": None,
    "prompt_logprob_token_ids": None,
    "logprob_token_ids": None,
    "thinking_token_budget": None,
    "trace_decode_token_ids": None,
}


def install() -> None:
    from vllm.v1.engine.input_processor import InputProcessor

    if getattr(InputProcessor.process_inputs, "_dlm", False):
        return
    process_inputs = InputProcessor.process_inputs

    @functools.wraps(process_inputs)
    def process_with_dlm(self, *args, **kwargs):
        request = process_inputs(self, *args, **kwargs)
        if is_diffusion_lm(self.model_config):
            if not hasattr(self, "dlm_options"):
                self.dlm_options = resolved_options(self.vllm_config)
            prepare(request, self.dlm_options, self.vllm_config)
        return request

    process_with_dlm._dlm = True
    InputProcessor.process_inputs = process_with_dlm


def prepare(request, server, vllm_config) -> None:
    """Checks a request and gives it the model's end-of-turn token."""
    params = request.sampling_params
    if params is None:
        refuse("pooling_params", None, "masked-diffusion language models only generate")
    if request.prompt_embeds is not None:
        refuse("prompt_embeds", None, "the canvas needs token ids")
    if request.resumable:
        refuse("resumable", True, "the canvas cannot grow")
    for field, neutral in NEUTRAL.items():
        value = getattr(params, field, neutral)
        if value != neutral and value not in ([], {}):
            refuse(field, value, "not supported with masked-diffusion language models")
    try:
        options = request_options(server, params.extra_args)
    except OptionError as error:
        refuse(error.field, (params.extra_args or {}).get(error.field), str(error), whole=True)

    config = vllm_config.model_config
    eot = getattr(config.hf_config, "eot_token_id", None)
    if eot is not None and not params.ignore_eos and eot not in (params.stop_token_ids or []):
        params.stop_token_ids = [*(params.stop_token_ids or []), eot]
        params._all_stop_token_ids.add(eot)

    prompt = len(request.prompt_token_ids)
    length = min(params.max_tokens, config.max_model_len - prompt)
    if length < 1:
        refuse("max_tokens", params.max_tokens, f"a prompt of {prompt} tokens leaves no room for a canvas")
    blocks = len(options.decoding.blocks(length))
    steps = options.decoding.steps
    if steps is not None and steps < blocks:
        refuse("dlm_steps", steps, f"{length} tokens make {blocks} blocks and each needs at least one step")
    blocks_needed = -(-(prompt + length) // vllm_config.cache_config.block_size)
    available = vllm_config.cache_config.num_gpu_blocks
    if available is not None and blocks_needed > available - 1:
        refuse("max_tokens", params.max_tokens, f"a canvas of {prompt + length} tokens does not fit the KV cache")


def refuse(field: str, value, why: str, whole: bool = False):
    from vllm.exceptions import VLLMValidationError

    message = why if whole else f"{field}: {value!r} cannot be honoured, {why}"
    raise VLLMValidationError(message, parameter=field, value=value)
