"""Refuses, in the front-end, what a denoising step cannot honour, naming the field.

An error in the scheduler or a worker would end the engine for everybody, so
nothing may reach them unchecked. Read in vLLM 0.32 and 0.33: v1/engine/input_processor.py
(`process_inputs` sees every request of `LLM` and of the servers) and
v1/engine/async_llm.py. What only a server's routes see is in bodies.py.
"""

from bisect import bisect_right
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import BeamSearchParams

from vllm_dlm.cache.budget import BlockShape
from vllm_dlm.given import NO_LAYOUT, Layout
from vllm_dlm.integration.canvas import default_length
from vllm_dlm.integration.given import (
    EncodedTexts,
    layout_of,
    refuse_draft,
    refuse_long,
    refuse_stops,
    refuse_template,
    texts_of,
    unmarked,
    with_texts,
)
from vllm_dlm.integration.prompts import is_text, prompt_ids
from vllm_dlm.integration.refusal import refuse
from vllm_dlm.integration.registration import is_diffusion_lm, resolved_options
from vllm_dlm.options import OptionError, Options, request_keys, request_options
from vllm_dlm.plugins.decoding.roles import without_speculation
from vllm_dlm.scoring.scored import SCORE, Scored
from vllm_dlm.shown import shown

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

#: what a client of the OpenAI API may have written instead
ALSO_SET_BY = {
    "structured_outputs": "response_format and tool_choice",
    "prompt_logprobs": "echo together with logprobs",
}

ONLY_DIFFUSION = "it is an option of masked-diffusion language models"
#: in `extra_args`, and harmless to a canvas
READ_BY_VLLM = ("kv_cache_report_mode",)
FRAMES_NEED = "frames come with a streamed chat or completion of a server"
WATCH_NEEDS = "requests can be watched on a server that was started with --dlm-view"

#: the observed request of a server that gets vLLM's internal id next, see integration/view.py. It is in a list, which
#: is emptied then, because contexts live on.
ADDED: ContextVar[list | None] = ContextVar("ADDED", default=None)


def process_inputs(process):
    def process_with_dlm(self, request_id, prompt, params, *args, **kwargs):
        no_max_tokens = getattr(params, "max_tokens", None) is None  # vLLM sets it, maybe in place
        if is_diffusion_lm(self.model_config) and isinstance(params, SamplingParams):
            refuse_stops(params)
        request = process(self, request_id, prompt, params, *args, **kwargs)
        if is_diffusion_lm(self.model_config):
            prepare(request, is_text(prompt), no_max_tokens, self)
        else:
            refuse_request(request.sampling_params, self.model_config)
        return request

    return process_with_dlm


def generate(generate_theirs):
    def generate_with_dlm(self, prompt, sampling_params, *args, **kwargs):
        texts = texts_of(sampling_params)
        check_early(prompt, sampling_params, self.input_processor, texts)
        return generate_theirs(self, prompt, with_texts(sampling_params, texts), *args, **kwargs)

    return generate_with_dlm


def resolve_watermarking(resolve):
    def resolve_with_dlm(self, params):
        if isinstance(params, BeamSearchParams) and is_diffusion_lm(self.model_config):
            refuse("use_beam_search", True, "beams grow token by token and a canvas does not")
        return resolve(self, params)

    return resolve_with_dlm


def check_early(prompt, params, processor, texts: EncodedTexts | None = None) -> None:
    """What can be said of a rendered prompt before the engine takes it."""
    if not is_diffusion_lm(processor.model_config):
        refuse_request(params, processor.model_config)
    elif isinstance(prompt, dict) and (ids := prompt.get("prompt_token_ids")) is not None:
        refuse_stops(params)
        options = options_of(params, processor)
        layout, behind = layout_of(options, processor, texts_of(params) if texts is None else texts)
        check(params, options, len(own_ids(ids, is_text(prompt), options, processor) + behind), processor, layout)


def prepare(request, text: bool, no_max_tokens: bool, processor) -> None:
    """Checks a request and gives it what vLLM does not know: masks that are text, a canvas, the end of a turn."""
    params = request.sampling_params
    if params is None:
        refuse("pooling_params", None, "masked-diffusion language models only generate")
    if request.prompt_embeds is not None:
        refuse("prompt_embeds", None, "the canvas needs token ids")
    if request.resumable:
        refuse("resumable", True, "the canvas cannot grow")
    options = options_of(params, processor)
    if options.observed and not ADDED.get():
        field, why = ("dlm_frames", FRAMES_NEED) if options.frames else ("dlm_watch", WATCH_NEEDS)
        refuse(field, 1, why)
    texts = texts_of(params)
    layout, behind = layout_of(options, processor, texts)
    request.prompt_token_ids = own_ids(request.prompt_token_ids, text, options, processor) + behind
    params.extra_args = layout.added_to(params.extra_args)
    if no_max_tokens:
        params.max_tokens = layout.length or open_length(options, len(request.prompt_token_ids), processor)
    check(params, options, len(request.prompt_token_ids), processor, layout)
    params.extra_args = unmarked(params.extra_args)
    if options.attention != "full":
        usual = server_options_of(processor).decoding.block_length
        request.cache_salt = salt(request.cache_salt, options.decoding.block_length, usual)

    config = processor.model_config
    if layout.holes:  # its end is one token, at which vLLM stops whether it is the tokenizer's or not
        params.max_tokens, params.stop_token_ids = layout.length, [layout.ends[0]]
        params._all_stop_token_ids.add(layout.ends[0])
    else:
        add_end_of_turn(params, config.hf_config)
    # numpy counts in 64 bits and wants seeds that are not negative; vLLM adds an index to them when n > 1.
    params.top_k = min(params.top_k, config.get_vocab_size())
    if params.seed is not None:
        params.seed %= 1 << 63
    texts.accepted()


def add_end_of_turn(params, hf_config) -> None:
    eot = getattr(hf_config, "eot_token_id", None)
    if eot is not None and not params.ignore_eos and eot not in (params.stop_token_ids or []):
        params.stop_token_ids = [*(params.stop_token_ids or []), eot]
        params._all_stop_token_ids.add(eot)


def salt(given: str | None, width: int, usual: int) -> str | None:
    """Of the hashes under which the prefix cache knows a request's blocks: keys depend on how wide canvas blocks are.
    No two pairs of `given` and `width` have the same, and where
    there is nothing to tell the hashes are vLLM's plain ones."""
    if given is None:
        return None if width == usual else str(width)
    return f"{width} {given}"


def own_ids(ids: list[int], text: bool, options: Options, processor) -> list[int]:
    """The prompt as the model gets it"""
    ids = prompt_ids(ids, text, options.infill, processor)
    mask_id, scored = processor.model_config.hf_config.mask_token_id, isinstance(options.decoding, Scored)
    if (scored or options.attention != "full") and mask_id in ids:
        if scored:
            refuse("prompt", shown(ids), "what is scored has a context without masks")
        field, value = ("dlm_infill", True) if options.infill else ("prompt", f"the mask, token {mask_id},")
        refuse(field, value, "this model reads a prompt block by block and cannot fill masks in it")
    return ids


def open_length(options: Options, prompt: int, processor) -> int:
    """Of a request that names none: where its canvas grows, as much as the model and the KV cache have room for."""
    if not options.grows or options.given.suffix:  # what comes behind says where the canvas ends
        return default_length(processor)
    length = options.canvas.length(max(processor.model_config.max_model_len - prompt, 1))
    if (pool := replica_blocks(processor)) is None:
        return length
    shape = BlockShape.of(processor.vllm_config)
    there = (pool - 1) * shape.block_size
    fitting = bisect_right(range(1, length + 1), there, key=lambda n: shape.tokens(options, prompt, prompt + n))
    return max(fitting, 1)


def options_of(params, processor) -> Options:
    return options_from(params.extra_args or {}, processor)


def options_from(given: Mapping[str, Any], processor) -> Options:
    """The options of a request, all of them meant for this plugin."""
    server = server_options_of(processor)
    for field, value in given.items():
        if not field.startswith("dlm_") and field not in READ_BY_VLLM and not isinstance(value, EncodedTexts):
            meant = f"dlm_{field}" in request_keys(server.decoding)
            unread = "options of masked-diffusion language models start with dlm_, and nothing else reads this one"
            refuse(field, value, f"write dlm_{field}" if meant else unread)
    refuse_long(given, server, processor)
    try:
        return request_options(server, given)
    except OptionError as error:
        refuse(error.field, given.get(error.field), str(error), whole=True)


def check(params, options: Options, prompt: int, processor, layout: Layout = NO_LAYOUT) -> None:
    """Refuses what cannot be honoured for a prompt of that many tokens."""
    for field, neutral in NEUTRAL.items():
        value = getattr(params, field, neutral)
        if value != neutral and value not in ([], {}):
            also = f" (also set by {ALSO_SET_BY[field]})" if field in ALSO_SET_BY else ""
            refuse(field, value, f"not supported with masked-diffusion language models{also}")

    model = processor.model_config
    longest = options.canvas.max
    asked = open_length(options, prompt, processor) if params.max_tokens is None else params.max_tokens
    if layout.holes:
        refuse_template(params, options, layout, prompt, processor)
        asked = len(layout.start)
    if longest is not None and asked > longest:
        refuse("max_tokens", asked, f"the longest canvas of this server has {longest} tokens")
    length = options.canvas_length(prompt, asked, model.max_model_len) - prompt
    if isinstance(options.decoding, Scored):
        mask_id, given = model.hf_config.mask_token_id, params.extra_args[SCORE]
        if why := options.decoding.misfit(prompt, asked, prompt + length, model.get_vocab_size(), mask_id):
            refuse(SCORE, given, why)
    if length < 1:
        if options.given.suffix:
            why = f"with the prompt it has {prompt} tokens, which leave no room for a canvas"
            refuse("dlm_suffix", options.given.suffix, f"{why} (it is also what suffix sets)")
        refuse("max_tokens", params.max_tokens, f"a prompt of {prompt} tokens leaves no room for a canvas")
    if options.given.draft:
        refuse_draft(options, layout, asked, length)
    blocks, steps = len(options.blocks(prompt, prompt + length)), options.decoding.steps
    if layout.holes:
        blocks = len(options.decoding.blocks(sum(each for _, each, _ in layout.holes)))
    if steps is not None and not options.decoding.block_steps(blocks - 1, blocks, 1):
        refuse("dlm_steps", steps, f"{length} tokens make {blocks} blocks and each needs at least one step")
    if steps is not None and steps > model.max_model_len:
        # Whoever lays out the schedule takes time and memory for every step of it.
        refuse("dlm_steps", steps, f"the longest canvas has {model.max_model_len} positions to fill")
    check_memory(params, options, prompt, length, processor)


def check_memory(params, options: Options, prompt: int, length: int, processor) -> None:
    """Refuses what the KV cache could never hold, blaming what takes the room."""
    cache, shape = processor.cache_config, BlockShape.of(processor.vllm_config)
    unit = options.selection.unit if options.selection.sparse else 1
    if cache.block_size % unit:
        size = f"block_size is {cache.block_size}"
        refuse("dlm_selection", options.selection.name, f"it reads {unit} tokens together, and {size}")
    if (pool := replica_blocks(processor)) is None:
        return

    def needed(options: Options) -> int:
        return shape.tokens(options, prompt, prompt + length) // cache.block_size

    total, there = needed(options), pool - 1
    if total <= there:
        return
    plain = request_options(options, {"dlm_reuse": "none", "dlm_selection": "none"})
    alone, takes = needed(plain), f"a canvas of {prompt + length} tokens takes"
    if alone > there:
        refuse("max_tokens", params.max_tokens, f"{takes} {alone} blocks of the KV cache, and there are {there}")
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
    blocks = f"{alone} blocks of the KV cache, {total} with {named}, and there are {there}"
    refuse(field, parts[field][0], f"{takes} {blocks}")


def replica_blocks(processor) -> int | None:
    """Blocks of one replica: the front-end is told the sum over all engines it sends requests to, and a canvas
    lies in one. Read in vLLM 0.32: v1/engine/core_client.py (`_apply_ready_response`, `engine_ranks_managed`)."""
    total, parallel = processor.cache_config.num_gpu_blocks, processor.vllm_config.parallel_config
    if parallel.data_parallel_rank_local is not None:
        replicas = 1  # a process of `LLM` for each replica
    elif parallel.local_engines_only:
        replicas = parallel.data_parallel_size_local
    else:
        replicas = parallel.data_parallel_size
    return None if total is None else total // replicas


def server_options_of(processor):
    if not hasattr(processor, "dlm_options"):
        processor.dlm_options = resolved_options(processor.vllm_config)
    return processor.dlm_options


def takes_options(model_config) -> bool:
    """Whether this plugin reads `dlm_*` options of requests. If not, vLLM treats them as it treats any other name."""
    return is_diffusion_lm(model_config) or getattr(model_config, "dlm_selects", False)  # see autoregressive.py


def refuse_request(params, model_config) -> None:
    """Rejects `dlm_*` options of a request to an autoregressive model that decodes with a selection."""
    if not takes_options(model_config):
        return
    for field, value in (getattr(params, "extra_args", None) or {}).items():
        if field.startswith("dlm_"):
            refuse(field, value, ONLY_DIFFUSION)
