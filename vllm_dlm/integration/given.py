"""What a request gives of its canvas, as tokens: the front-end has the tokenizer, and refuses what cannot be held.

Texts are bounded by characters before anything reads them, as vLLM bounds prompts, and each is encoded once per
request. Requests of a server are encoded by vLLM's tokenizer threads. Read in vLLM 0.32 and 0.33: renderers/params.py
(`_text_len_check`), renderers/base.py (`_executor`).
"""

import asyncio
import copy
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from vllm_dlm.given import GIVEN_KEYS, Layout, Text
from vllm_dlm.integration.prompts import prompt_ids
from vllm_dlm.integration.refusal import refuse
from vllm_dlm.integration.vocabulary import HoleAutomata, Vocabulary
from vllm_dlm.options import Options
from vllm_dlm.template import Hole, Part, TemplateBounds, TemplateError, parse

#: in `extra_args`, on the way from the routes of a server to its engine: an EncodedTexts, which goes no farther
ENCODED = "canvas_texts"


class Unbounded(str):
    """A template of a chat that gives no `max_tokens`, which vLLM fills in. It goes no farther than the front-end."""


def unmarked(extra_args: dict | None) -> dict | None:
    """As they go to the engine"""
    if extra_args is None:
        return None
    return {
        name: str(value) if isinstance(value, Unbounded) else value
        for name, value in extra_args.items()
        if name != ENCODED
    }


# -- bounds ------------------------------------------------------------------------------------


def refuse_long(given: Mapping[str, Any], options: Options, processor) -> None:
    """`given`: fields of a request as they came, before anything reads them. `options`: of the server"""
    longest = processor.model_config.max_model_len
    for field in GIVEN_KEYS:
        value = given.get(field)
        if isinstance(value, str):
            most, limit = longest * characters_per_token(processor), f"more than any {longest} tokens have"
            if field == "dlm_template":
                most = options.limits.template_characters
                limit = f"and the limit is {most} (--dlm-config limits.template_characters)"
            if len(value) > most:
                refuse(field, value, f"it has {len(value)} characters, {limit}")
        elif isinstance(value, list | tuple) and len(value) > longest:
            refuse(field, value, f"it has {len(value)} token ids, and the model reads {longest}")


def characters_per_token(processor) -> int:
    """Of the longest token"""
    return getattr(processor.tokenizer, "max_chars_per_token", None) or 1 << 7


# -- encoding ----------------------------------------------------------------------------------


class EncodedTexts:
    """Of one request: its texts as they were encoded, and its template"""

    def __init__(self):
        self._tokens: dict[str, list[int]] = {}
        self._template: TemplateLayout | None = None

    def __bool__(self) -> bool:
        return bool(self._tokens) or self._template is not None

    def __deepcopy__(self, memo) -> "EncodedTexts":
        return self  # vLLM copies a request's parameters

    def tokens(self, text: str, processor) -> list[int]:
        if text not in self._tokens:
            self._tokens[text] = processor.get_tokenizer().encode(text, add_special_tokens=False)
        return self._tokens[text]

    def template(self, text: str, options: Options, processor) -> Layout:
        if self._template is None or self._template.text != text:
            self._template = template_layout(text, options, processor)
        return self._template.layout

    def accepted(self) -> None:
        """The request is: layouts of refused ones are not kept."""
        if self._template is not None:
            self._template.keep()


#: of the request that a route of the server handles
_HANDLED: ContextVar[EncodedTexts | None] = ContextVar("encoded_texts", default=None)


def texts_of(params) -> EncodedTexts:
    found = (getattr(params, "extra_args", None) or {}).get(ENCODED)
    return found if isinstance(found, EncodedTexts) else _HANDLED.get() or EncodedTexts()


def with_texts(params, texts: EncodedTexts):
    """The parameters with them, for `process_inputs`, which may run in another context"""
    if texts:
        params = copy.copy(params)
        params.extra_args = {**params.extra_args, ENCODED: texts}
    return params


async def encode(options: Options, processor) -> None:
    """In a thread of vLLM's tokenizer, for what the rest of this request's handler asks."""
    texts = EncodedTexts()
    _HANDLED.set(texts)
    if options.given.any:
        threads = getattr(processor.renderer, "_executor", None)
        await asyncio.get_running_loop().run_in_executor(threads, layout_of, options, processor, texts)


def layout_of(options: Options, processor, texts: EncodedTexts) -> tuple[Layout, list[int]]:
    """How the canvas is laid out, and the tokens after it."""
    if options.given.template:
        return texts.template(options.given.template, options, processor), []
    given = options.given
    suffix = tokens_of("dlm_suffix", given.suffix, processor, texts, options.infill)
    draft = tokens_of("dlm_draft", given.draft, processor, texts, options.infill)
    remask = (0.5 if given.remask is None else given.remask) if draft else 0.0
    return Layout(suffix=len(suffix), start=draft, remask=remask), suffix


def tokens_of(field: str, given: Text, processor, texts: EncodedTexts, infill: bool | None = None) -> list[int]:
    """Masks among them are holes as those of a prompt are."""
    if not isinstance(given, str):
        size = processor.model_config.get_vocab_size()
        for token in given:
            if not 0 <= token < size:
                refuse(field, token, f"token ids are those from 0 to {size - 1}")
        return prompt_ids(list(given), False, infill, processor)
    if not given:
        return []
    if processor.tokenizer is None:
        refuse(field, given, "this engine has no tokenizer, so give a list of token ids")
    return prompt_ids(texts.tokens(given, processor), True, infill, processor)


# -- templates ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class TemplateLayout:
    text: str
    layout: Layout
    vocabulary: Vocabulary
    automata: HoleAutomata | None = None  # None: it is kept already

    def keep(self) -> None:
        if self.automata is not None:
            self.vocabulary.layouts.put(self.text, self.layout)
            self.automata.keep()


def template_layout(template: str, options: Options, processor) -> TemplateLayout:
    """Texts become tokens one by one, so none goes across the edge of a hole. A template that is too long is refused
    before its next part is encoded."""
    if processor.tokenizer is None:
        refuse("dlm_template", template, "this engine has no tokenizer")
    vocabulary = Vocabulary.of(processor)
    if (found := vocabulary.layouts.get(template)) is not None:
        return TemplateLayout(template, found, vocabulary)
    limits, longest = options.limits, processor.model_config.max_model_len
    start, places = list[int](), list[int]()
    try:
        parts = parse(template, TemplateBounds(longest, limits.template_holes, limits.template_automata))
        holes = [part for part in parts if isinstance(part, Hole)]
        left = sum(hole.length for hole in holes) + 1  # of holes that come, and the end
        for part in parts:
            if isinstance(part, Part):
                least = -(-len(part.text) // characters_per_token(processor))
                refuse_longer(template, len(start) + least + left, options, longest)
                start += vocabulary.encoded(part.text)
            else:
                places.append(len(start))
                start += [vocabulary.mask_id] * part.length
                left -= part.length
            refuse_longer(template, len(start) + left, options, longest)
        automata = HoleAutomata(vocabulary, holes)
    except TemplateError as error:
        refuse("dlm_template", template, str(error))
    at = [(first, hole.length, of) for first, hole, of in zip(places, holes, automata.of, strict=True)]
    layout = Layout(start=start, holes=at, automata=automata.plain, ends=vocabulary.ends)
    return TemplateLayout(template, layout, vocabulary, automata)


def refuse_longer(template: str, tokens: int, options: Options, longest: int) -> None:
    """`tokens`: of the template, with its end, at least; `longest`: of what the model reads"""
    if options.canvas.max is not None and tokens > options.canvas.max:
        why = f"it has {tokens} tokens or more with its end, and the longest canvas of this server {options.canvas.max}"
        refuse("dlm_template", template, why)
    if tokens > longest:
        refuse("dlm_template", template, f"it has {tokens} tokens or more with its end, and the model reads {longest}")


def refuse_stops(params) -> None:
    """Of a template's request as it came: vLLM adds the model's own end tokens later."""
    if (params.extra_args or {}).get("dlm_template"):
        for field in ("stop", "stop_token_ids"):
            if value := getattr(params, field):
                refuse(field, value, "it could end the answer in the fixed text of dlm_template, which ends by itself")


def refuse_template(params, options: Options, layout: Layout, prompt: int, processor) -> None:
    """Refuses what does not go with a template, or leaves no room for it."""
    given, longest = options.given, processor.model_config.max_model_len
    if given.suffix:
        why = "a template is all of the canvas and of what comes behind it; write it to the end of the template"
        refuse("dlm_suffix", given.suffix, why)
    if given.draft:
        refuse("dlm_draft", given.draft, "a template says what the canvas starts with")
    if params.ignore_eos:
        refuse("ignore_eos", True, "with dlm_template an end token ends a hole, and the template the answer")
    bounded = not isinstance((params.extra_args or {}).get("dlm_template"), Unbounded)
    if bounded and params.max_tokens is not None and params.max_tokens < layout.length:
        why = f"the template has {layout.length - 1} tokens and its end is one: give {layout.length}, or none in a chat"
        refuse("max_tokens", params.max_tokens, why)
    refuse_longer(given.template, layout.length, options, longest)
    if prompt + layout.length > longest:
        why = f"it has {layout.length} tokens with its end, the prompt {prompt}, and the model reads {longest}"
        refuse("dlm_template", given.template, why)


def refuse_draft(options: Options, layout: Layout, asked: int, length: int) -> None:
    """`asked`: max_tokens; `length`: of the canvas"""
    if options.grows:
        why = "dlm_extent: a draft is read as a whole, and beyond the window nothing is; ask for full"
        refuse("dlm_draft", options.given.draft, why)
    if len(layout.start) > length:
        refuse("max_tokens", asked, f"the draft has {len(layout.start)} tokens, and the canvas has room for {length}")
