"""Checks a parsed request against its prompt, vLLM's sampling parameters and the server's memory.

An error in the scheduler or a worker would stop the engine for all clients, so requests are checked before they get
there.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vllm_dlm.options import Options, request_options
from vllm_dlm.options.scored import SCORE, Scored
from vllm_dlm.options.types import reject
from vllm_dlm.plugins.decoding.roles import without_speculation
from vllm_dlm.request.canvas_request import CanvasRequest
from vllm_dlm.request.parsing import ParsedRequest
from vllm_dlm.request.prompts import prompt_ids
from vllm_dlm.request.served_model import ServedModel
from vllm_dlm.request.texts import check_template_length
from vllm_dlm.shown import shown

#: SamplingParams fields that change logits or the order of generation in ways that a denoising step does not implement
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

#: fields of the OpenAI API that set these
ALSO_SET_BY = {
    "structured_outputs": "response_format and tool_choice",
    "prompt_logprobs": "echo together with logprobs",
}


def check_stops(params: Any) -> None:
    """Rejects stop strings and tokens with a template. Call this before vLLM adds the model's own end tokens."""
    if (params.extra_args or {}).get("dlm_template"):
        for field in ("stop", "stop_token_ids"):
            if value := getattr(params, field):
                reject(field, value, "it could end the answer within the fixed text of dlm_template")


def check(
    parsed: ParsedRequest, params: Any, max_tokens: int | None, prompt: list[int], text: bool, model: ServedModel
) -> CanvasRequest:
    """`params`: SamplingParams; `max_tokens`: as given by the client; `text`: whether the client wrote the prompt as
    text"""
    options, layout = parsed.options, parsed.texts.layout
    ids = read_ids(prompt, text, options, model) + parsed.texts.suffix
    check_neutral(params)
    if max_tokens is None:
        max_tokens = layout.length or open_length(options, len(ids), model)
    if layout.holes:
        check_template(parsed, params, max_tokens, len(ids), model)
    length = check_length(parsed, max_tokens, len(ids), model)
    check_memory(options, max_tokens, len(ids), length, model)
    return CanvasRequest(options, layout, ids, layout.length or max_tokens, len(ids) + length)


def check_neutral(params: Any) -> None:
    for field, neutral in NEUTRAL.items():
        value = getattr(params, field, neutral)
        if value != neutral and value not in ([], {}):
            also = f" (also set by {ALSO_SET_BY[field]})" if field in ALSO_SET_BY else ""
            reject(field, value, f"masked-diffusion language models do not implement it{also}")


def read_ids(ids: list[int], text: bool, options: Options, model: ServedModel) -> list[int]:
    """The token ids that the model reads"""
    ids = prompt_ids(ids, text, options.infill, model.processor)
    scored = isinstance(options.decoding, Scored)
    if (scored or options.attention != "full") and model.mask_id in ids:
        if scored:
            reject("prompt", shown(ids), "the context of a score must not contain masks")
        field, value = ("dlm_infill", True) if options.infill else ("prompt", f"the mask, token {model.mask_id},")
        reject(field, value, "this model is block-causal and cannot fill masks of the prompt")
    return ids


def open_length(options: Options, prompt: int, model: ServedModel) -> int:
    """Response length of a request without `max_tokens`. A canvas that grows may use all of the model's length and the
    KV cache, unless a suffix fixes its end."""
    if not options.grows or options.texts.suffix:
        return model.default_length
    length = options.canvas.length(max(model.max_model_len - prompt, 1))
    if (pool := model.replica_blocks) is None:
        return length
    shape = model.block_shape
    room = (pool - 1) * shape.block_size
    fitting = bisect_right(range(1, length + 1), room, key=lambda n: shape.tokens(options, prompt, prompt + n))
    return max(fitting, 1)


def check_template(parsed: ParsedRequest, params: Any, max_tokens: int, prompt: int, model: ServedModel) -> None:
    texts, layout, longest = parsed.options.texts, parsed.texts.layout, model.max_model_len
    if texts.suffix:
        why = "a template includes the text after the canvas; append the suffix to the template"
        reject("dlm_suffix", texts.suffix, why)
    if texts.start:
        reject("dlm_start", texts.start, "a template already defines the start of the canvas")
    if params.ignore_eos:
        reject("ignore_eos", True, "with dlm_template, end tokens end holes and the template ends the answer")
    if parsed.template_is_bounded and max_tokens < layout.length:
        why = f"it must be at least {layout.length}, the length of the template with its end token, or unset in a chat"
        reject("max_tokens", max_tokens, why)
    check_template_length(texts.template, layout.length, parsed.options, longest)
    if prompt + layout.length > longest:
        why = f"it has {layout.length} tokens with its end and the prompt {prompt}; the model's length is {longest}"
        reject("dlm_template", texts.template, why)


def check_length(parsed: ParsedRequest, max_tokens: int, prompt: int, model: ServedModel) -> int:
    """-> positions of the response"""
    options, layout = parsed.options, parsed.texts.layout
    asked = len(layout.start) if layout.holes else max_tokens
    if options.canvas.max is not None and asked > options.canvas.max:
        reject("max_tokens", asked, f"the maximum canvas of this server is {options.canvas.max} tokens")
    length = options.canvas_length(prompt, asked, model.max_model_len) - prompt
    if isinstance(options.decoding, Scored):
        why = options.decoding.misfit(prompt, asked, prompt + length, model.vocabulary_size, model.mask_id)
        if why is not None:
            reject(SCORE, parsed.written[SCORE], why)
    if length < 1:
        if options.texts.suffix:
            why = f"it has {prompt} tokens with the prompt, which leaves no room for a canvas (also set by suffix)"
            reject("dlm_suffix", options.texts.suffix, why)
        reject("max_tokens", max_tokens, f"a prompt of {prompt} tokens leaves no room for a canvas")
    if options.texts.start:
        check_start(parsed, asked, length)
    check_steps(parsed, prompt, length, model)
    return length


def check_start(parsed: ParsedRequest, asked: int, length: int) -> None:
    """`asked`: max_tokens; `length`: canvas length without the prompt"""
    options, start = parsed.options, parsed.texts.layout.start
    if options.grows:
        why = "a starting text requires dlm_extent full"
        reject("dlm_start", options.texts.start, why)
    if len(start) > length:
        reject("max_tokens", asked, f"the starting text has {len(start)} tokens, and the canvas {length}")


def check_steps(parsed: ParsedRequest, prompt: int, length: int, model: ServedModel) -> None:
    options, layout, steps = parsed.options, parsed.texts.layout, parsed.options.decoding.steps
    if steps is None:
        return
    blocks = len(options.blocks(prompt, prompt + length))
    if layout.holes:
        blocks = len(options.decoding.blocks(sum(size for _, size, _ in layout.holes)))
    if not options.decoding.block_steps(blocks - 1, blocks, 1):
        reject("dlm_steps", steps, f"it must be at least {blocks}, one step for each canvas block of {length} tokens")
    if steps > model.max_model_len:
        # each step of a schedule takes time and memory
        reject("dlm_steps", steps, f"it must be at most {model.max_model_len}, the model's length")


def check_memory(options: Options, max_tokens: int, prompt: int, length: int, model: ServedModel) -> None:
    """Rejects requests that the KV cache could never hold. The error names the option that uses most blocks."""
    shape, size = model.block_shape, model.block_size
    unit = options.selection.unit if options.selection.sparse else 1
    if size % unit:
        reject(
            "dlm_selection",
            options.selection.name,
            f"it reads units of {unit} tokens, which must divide block_size, {size}",
        )
    if (pool := model.replica_blocks) is None:
        return

    def needed(options: Options) -> int:
        return shape.tokens(options, prompt, prompt + length) // size

    if needed(options) > pool - 1:
        reject_memory(options, needed, max_tokens, prompt + length, pool - 1)


def reject_memory(options: Options, needed: Callable[[Options], int], max_tokens: int, length: int, room: int) -> None:
    """`needed`: number of KV blocks of a canvas of `length` positions; `room`: number of KV blocks in the cache"""
    plain = request_options(options, {"dlm_reuse": "none", "dlm_selection": "none"})
    total, alone, takes = needed(options), needed(plain), f"a canvas of {length} tokens takes"
    if alone > room:
        reject("max_tokens", max_tokens, f"{takes} {alone} blocks of the KV cache, which has {room}")
    decoding, reuse, selection = options.decoding, options.reuse, options.selection
    #: field -> (its value, the request without it)
    parts = {
        "dlm_cfg_scale": (decoding.cfg_scale, replace(options, decoding=replace(decoding, cfg_scale=0.0))),
        "dlm_drafts": (getattr(decoding, "drafts", 1), replace(options, decoding=without_speculation(decoding))),
        "dlm_reuse": (reuse.name, replace(options, reuse=plain.reuse)),
        "dlm_selection": (selection.name, replace(options, selection=plain.selection)),
    }
    saved = {field: total - needed(other) for field, (_, other) in parts.items()}
    field = max(saved, key=lambda name: saved[name])
    named = " and ".join(name for name, blocks in saved.items() if blocks > 0)
    blocks = f"{alone} blocks of the KV cache, {total} with {named}; the cache has {room}"
    reject(field, parts[field][0], f"{takes} {blocks}")
