"""Request bodies in a server's routes. Rejects options outside of `vllm_xargs`, and invalid requests whose response
would already have begun when the engine checks them. Tokenises the texts of a request in a thread.

Read in vLLM 0.32 and 0.33: entrypoints/serve/engine/serving.py (`_check_model`, which every route calls first),
serve/engine/protocol.py (`OpenAIBaseModel` silently keeps unknown fields), openai/responses/serving.py
(`_generate_with_builtin_tools` is a generator, so its request would be checked after the response has begun),
scale_out/token_in_token_out/serving.py (requests with SamplingParams).
"""

from vllm_dlm.configuration import is_diffusion_lm
from vllm_dlm.families import record_of
from vllm_dlm.integration.requests import carrying, check_early, parse_in_thread, takes_options
from vllm_dlm.refusal import ONLY_DIFFUSION, refuse
from vllm_dlm.request.parsing import UnboundedTemplate, has_texts


def check_model(check):
    async def check_model_and_fields(self, request):
        refuse_misplaced(request, self.model_config)
        take_suffix(request, self.model_config)
        mark_template(request, self.model_config)
        set_template_defaults(request, self)
        error = await check(self, request)
        if error is None and is_diffusion_lm(self.model_config) and hasattr(self, "engine_client"):
            written = written_options(request)
            if has_texts(written):
                await parse_in_thread(written, self.engine_client.input_processor)
        return error

    return check_model_and_fields


def written_options(request) -> dict:
    """Options of a body, or of the SamplingParams in it"""
    written = getattr(request, "vllm_xargs", None)
    if written is None and (params := getattr(request, "sampling_params", None)) is not None:
        written = params.extra_args
    return written or {}


def generate_with_builtin_tools(generate):
    def generate_if_possible(self, *args, engine_input, sampling_params, **kwargs):
        checked = check_early(engine_input, sampling_params, self.engine_client.input_processor)
        params = carrying(sampling_params, checked)
        return generate(self, *args, engine_input=engine_input, sampling_params=params, **kwargs)

    return generate_if_possible


def refuse_misplaced(request, model_config) -> None:
    """Rejects `dlm_*` fields next to `vllm_xargs`, which vLLM would ignore."""
    if not takes_options(model_config):
        return
    for field, value in (getattr(request, "model_extra", None) or {}).items():
        if field.startswith("dlm_"):
            right = 'write it into "vllm_xargs"' if is_diffusion_lm(model_config) else ONLY_DIFFUSION
            refuse(field, value, right)


def take_suffix(request, model_config) -> None:
    """Turns OpenAI's field into an option. In vLLM a suffix is part of the prompt, here it is placed after the
    canvas."""
    if (suffix := getattr(request, "suffix", None)) is None or not is_diffusion_lm(model_config):
        return
    written = request.vllm_xargs or {}
    if "dlm_suffix" in written:
        refuse("dlm_suffix", written["dlm_suffix"], "suffix sets the same option; use one of them")
    request.suffix, request.vllm_xargs = None, {**written, "dlm_suffix": suffix}


def set_template_defaults(request, serving) -> None:
    """Sets the family's defaults for variables of the chat template that neither the request nor the server sets."""
    if not hasattr(request, "chat_template_kwargs") or not is_diffusion_lm(serving.model_config):
        return
    if usual := record_of(serving.model_config).template_kwargs:
        names = ("default_chat_template_kwargs", "chat_template_kwargs")  # chats, responses
        served: dict = next(filter(None, (getattr(serving, name, None) for name in names)), {})
        request.chat_template_kwargs = usual | served | (request.chat_template_kwargs or {})


def mark_template(request, model_config) -> None:
    """Marks a template of a request without `max_tokens`: vLLM's default does not bound its length."""
    written = getattr(request, "vllm_xargs", None) or {}
    bounds = ("max_tokens", "max_completion_tokens", "max_output_tokens")
    if any(getattr(request, field, None) is not None for field in bounds) or not is_diffusion_lm(model_config):
        return
    if isinstance(template := written.get("dlm_template"), str):
        request.vllm_xargs = {**written, "dlm_template": UnboundedTemplate(template)}
