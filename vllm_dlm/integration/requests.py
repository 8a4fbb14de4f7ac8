"""Creates one `CanvasRequest` per request to a diffusion model and sends it to the engine.

vllm_dlm/request parses and checks it. vLLM's functions that are wrapped for this:

- `process_inputs` processes every request of `LLM` and of servers, and its result is sent to the engine.
- `AsyncLLM.generate` is called before it on a server. Invalid requests are rejected there, because the headers of a
  stream are sent before `process_inputs` runs. The checked request is passed to `process_inputs` in `extra_args`.
- Routes of a server run first (bodies.py) and tokenise texts in a thread. A context variable holds the result.

Read in vLLM 0.32 and 0.33: v1/engine/input_processor.py, v1/engine/async_llm.py.
"""

import asyncio
import copy
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import BeamSearchParams

from vllm_dlm.configuration import is_diffusion_lm
from vllm_dlm.integration import view
from vllm_dlm.refusal import ONLY_DIFFUSION, refusals, refuse
from vllm_dlm.request.canvas_request import CANVAS_REQUEST, CanvasRequest
from vllm_dlm.request.checks import check, check_stops
from vllm_dlm.request.parsing import READ_BY_VLLM, ParsedRequest, parse
from vllm_dlm.request.prompts import is_text
from vllm_dlm.request.served_model import ServedModel, served_model


@dataclass(frozen=True)
class CheckedRequest:
    """A CanvasRequest that `generate` passes to `process_inputs`, with the inputs that it was created from."""

    request: CanvasRequest
    parsed: ParsedRequest
    prompt: list[int]
    max_tokens: int | None

    def __deepcopy__(self, memo) -> "CheckedRequest":
        return self  # vLLM deep-copies the parameters of a request

    def is_of(self, prompt: Any, max_tokens: int | None) -> bool:
        """Whether it belongs to this prompt and length; clients may reuse parameters."""
        ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
        return self.prompt is ids and self.max_tokens == max_tokens


#: parsed options of the request that the current route handles
_HANDLED: ContextVar[ParsedRequest | None] = ContextVar("parsed_request", default=None)


# -- wrappers of vLLM's functions --------------------------------------------------------------


def process_inputs(process):
    def process_with_dlm(self, request_id, prompt, params, *args, **kwargs):
        if not is_diffusion_lm(self.model_config):
            request = process(self, request_id, prompt, params, *args, **kwargs)
            refuse_options(request.sampling_params, self.model_config)
            return request
        max_tokens = getattr(params, "max_tokens", None)  # before vLLM may set it in place
        checked = carried(params, prompt, max_tokens)
        if checked is None and isinstance(params, SamplingParams):
            with refusals():
                check_stops(params)
        request = process(self, request_id, prompt, params, *args, **kwargs)
        refuse_kind(request)
        if checked is None:
            checked = checked_request(params, max_tokens, request.prompt_token_ids, is_text(prompt), self)
        refuse_unobserved(checked)
        hand_over(checked, request, served_model(self))
        return request

    return process_with_dlm


def generate(generate_theirs):
    def generate_with_dlm(self, prompt, sampling_params, request_id, *args, **kwargs):
        checked = check_early(prompt, sampling_params, self.input_processor)
        outputs = generate_theirs(self, prompt, carrying(sampling_params, checked), request_id, *args, **kwargs)
        if checked is None:
            return outputs
        return view.observe(self, outputs, sampling_params, request_id, checked.request.options)

    return generate_with_dlm


def resolve_watermarking(resolve):
    def resolve_with_dlm(self, params):
        if isinstance(params, BeamSearchParams) and is_diffusion_lm(self.model_config):
            refuse("use_beam_search", True, "beam search requires autoregressive decoding")
        return resolve(self, params)

    return resolve_with_dlm


# -- creating a request ------------------------------------------------------------------------


def check_early(prompt: Any, params: Any, processor: Any) -> CheckedRequest | None:
    """Checks a request with a rendered prompt before it is sent to the engine. None: the model is autoregressive, or
    the prompt is not rendered yet and `process_inputs` checks the request."""
    if not is_diffusion_lm(processor.model_config):
        refuse_options(params, processor.model_config)
        return None
    if not isinstance(prompt, dict) or (ids := prompt.get("prompt_token_ids")) is None:
        return None
    if (checked := carried(params, prompt, params.max_tokens)) is not None:
        return checked
    with refusals():
        check_stops(params)
    return checked_request(params, params.max_tokens, ids, is_text(prompt), processor)


def checked_request(params: Any, max_tokens: int | None, ids: list[int], text: bool, processor: Any) -> CheckedRequest:
    written = options_in(params)
    with refusals(written):
        parsed = _HANDLED.get()
        if parsed is None or parsed.written != written:
            parsed = parse(written, served_model(processor))
        return CheckedRequest(
            check(parsed, params, max_tokens, ids, text, served_model(processor)), parsed, ids, max_tokens
        )


async def parse_in_thread(written: Mapping[str, Any], processor: Any) -> None:
    """Parses and tokenises in vLLM's tokenizer threads. The handler of this HTTP request reuses the result."""
    model = served_model(processor)
    with refusals(written):
        loop = asyncio.get_running_loop()
        _HANDLED.set(await loop.run_in_executor(model.tokenizer_threads, parse, written, model))


def options_in(params: Any) -> dict[str, Any]:
    """`extra_args` as written by the client"""
    extra_args = getattr(params, "extra_args", None) or {}
    return {name: value for name, value in extra_args.items() if not isinstance(value, CheckedRequest)}


def carried(params: Any, prompt: Any, max_tokens: int | None) -> CheckedRequest | None:
    found = (getattr(params, "extra_args", None) or {}).get(CANVAS_REQUEST)
    return found if isinstance(found, CheckedRequest) and found.is_of(prompt, max_tokens) else None


def carrying(params: Any, checked: CheckedRequest | None) -> Any:
    """The parameters with the checked request, because `process_inputs` may run in another context"""
    if checked is None:
        return params
    params = copy.copy(params)
    params.extra_args = {**(params.extra_args or {}), CANVAS_REQUEST: checked}
    return params


# -- to the engine -----------------------------------------------------------------------------


def refuse_kind(request: Any) -> None:
    if request.sampling_params is None:
        refuse("pooling_params", None, "masked-diffusion language models do not support pooling")
    if request.prompt_embeds is not None:
        refuse("prompt_embeds", None, "a canvas requires token ids")
    if request.resumable:
        refuse("resumable", True, "a canvas cannot be extended")


def refuse_unobserved(checked: CheckedRequest) -> None:
    """Rejects observed requests outside of a server's streams and live view."""
    options = checked.request.options
    if options.observed and not view.ADDED.get():
        field, why = ("dlm_frames", view.FRAMES_NEED) if options.frames else ("dlm_watch", view.WATCH_NEEDS)
        refuse(field, 1, why)


def hand_over(checked: CheckedRequest, request: Any, model: ServedModel) -> None:
    """Writes a checked request to vLLM's request for the engine."""
    params, own = request.sampling_params, checked.request
    request.prompt_token_ids, params.max_tokens = own.prompt_ids, own.max_tokens
    kept = {name: value for name, value in checked.parsed.written.items() if name in READ_BY_VLLM}
    params.extra_args = {**kept, CANVAS_REQUEST: own.to_wire()}
    if own.options.attention != "full":
        usual = model.options.decoding.block_length
        request.cache_salt = salt(request.cache_salt, own.options.decoding.block_length, usual)
    if own.layout.holes:  # makes vLLM stop at the template's end token, even if it is unknown to the tokenizer
        params.stop_token_ids = [own.layout.ends[0]]
        params._all_stop_token_ids.add(own.layout.ends[0])
    else:
        add_end_of_turn(params, model.hf_config)
    # numpy requires non-negative seeds of 64 bits; vLLM adds an index to them if n > 1.
    params.top_k = min(params.top_k, model.vocabulary_size)
    if params.seed is not None:
        params.seed %= 1 << 63
    checked.parsed.texts.keep()


def add_end_of_turn(params: Any, hf_config: Any) -> None:
    eot = getattr(hf_config, "eot_token_id", None)
    if eot is not None and not params.ignore_eos and eot not in (params.stop_token_ids or []):
        params.stop_token_ids = [*(params.stop_token_ids or []), eot]
        params._all_stop_token_ids.add(eot)


def salt(given: str | None, width: int, usual: int) -> str | None:
    """Salt of the prefix cache's hashes, because keys depend on the canvas block length. Different pairs of `given` and
    `width` have different salts. With the usual width and no given salt, vLLM's hashes are unchanged."""
    if given is None:
        return None if width == usual else str(width)
    return f"{width} {given}"


# -- autoregressive models ---------------------------------------------------------------------


def takes_options(model_config: Any) -> bool:
    """Whether this plugin reads `dlm_*` options of requests. Otherwise they are like any other unknown name for
    vLLM."""
    return is_diffusion_lm(model_config) or getattr(model_config, "dlm_selects", False)  # see autoregressive.py


def refuse_options(params: Any, model_config: Any) -> None:
    """Rejects `dlm_*` options of a request to an autoregressive model that decodes with a selection."""
    if not takes_options(model_config):
        return
    for field, value in (getattr(params, "extra_args", None) or {}).items():
        if field.startswith("dlm_"):
            refuse(field, value, ONLY_DIFFUSION)
