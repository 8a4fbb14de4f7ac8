"""Tokenises the texts of a request (suffix, starting text, template) and lays out its canvas.

The number of characters of each text is checked first, as vLLM does for prompts, and each text is encoded once per
request. Read in vLLM 0.32 and 0.33: renderers/params.py (`_text_len_check`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_dlm.options import Options
from vllm_dlm.options.texts import TEXT_KEYS, Layout, Text
from vllm_dlm.options.types import reject
from vllm_dlm.request.prompts import prompt_ids
from vllm_dlm.request.served_model import ServedModel
from vllm_dlm.request.template import Hole, Part, TemplateBounds, TemplateError, parse
from vllm_dlm.request.vocabulary import HoleAutomata, Vocabulary, vocabulary_of


def check_sizes(written: Mapping[str, Any], model: ServedModel) -> None:
    """`written`: unparsed options of a request"""
    longest = model.max_model_len
    for field in TEXT_KEYS:
        value = written.get(field)
        if isinstance(value, str):
            most, limit = longest * model.characters_per_token, f"more than {longest} tokens can have"
            if field == "dlm_template":
                most = model.options.limits.template_characters
                limit = f"and the limit is {most} (--dlm-config limits.template_characters)"
            if len(value) > most:
                reject(field, value, f"it has {len(value)} characters, {limit}")
        elif isinstance(value, list | tuple) and len(value) > longest:
            reject(field, value, f"it has {len(value)} token ids, and the model's length is {longest}")


@dataclass(frozen=True)
class TokenisedTexts:
    layout: Layout
    suffix: list[int]  # tokens after the canvas
    template: "TemplateLayout | None" = None

    def keep(self) -> None:
        """Caches the template. Called when its request is accepted, so that layouts of rejected requests are not
        kept."""
        if self.template is not None:
            self.template.keep()


def tokenise(options: Options, model: ServedModel) -> TokenisedTexts:
    texts = options.texts
    if texts.template:
        template = template_layout(texts.template, options, model)
        return TokenisedTexts(template.layout, [], template)
    suffix = token_ids("dlm_suffix", texts.suffix, model, options.infill)
    start = token_ids("dlm_start", texts.start, model, options.infill)
    remask = (0.5 if texts.remask is None else texts.remask) if start else 0.0
    return TokenisedTexts(Layout(suffix=len(suffix), start=start, remask=remask), suffix)


def token_ids(field: str, text: Text, model: ServedModel, infill: bool | None = None) -> list[int]:
    """Tokens of a text. Masks in it are filled or spelt out by the same rule as in a prompt."""
    if not isinstance(text, str):
        for token in text:
            if not 0 <= token < model.vocabulary_size:
                reject(field, token, f"token ids must be between 0 and {model.vocabulary_size - 1}")
        return prompt_ids(list(text), False, infill, model.processor)
    if not text:
        return []
    if model.tokenizer is None:
        reject(field, text, "this engine has no tokenizer; give a list of token ids")
    ids = model.processor.get_tokenizer().encode(text, add_special_tokens=False)
    return prompt_ids(ids, True, infill, model.processor)


# -- templates ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class TemplateLayout:
    text: str
    layout: Layout
    vocabulary: Vocabulary
    automata: HoleAutomata | None = None  # None: the layout was cached

    def keep(self) -> None:
        if self.automata is not None:
            self.vocabulary.layouts.put(self.text, self.layout)
            self.automata.keep()


def template_layout(template: str, options: Options, model: ServedModel) -> TemplateLayout:
    """Encodes the texts between holes one by one, so that no token crosses the border of a hole. A template that is too
    long is rejected before its next text is encoded."""
    if model.tokenizer is None:
        reject("dlm_template", template, "this engine has no tokenizer")
    vocabulary = vocabulary_of(model)
    if (known := vocabulary.layouts.get(template)) is not None:
        return TemplateLayout(template, known, vocabulary)
    limits, longest = options.limits, model.max_model_len
    start, places = list[int](), list[int]()
    try:
        parts = parse(template, TemplateBounds(longest, limits.template_holes, limits.template_automata))
        holes = [part for part in parts if isinstance(part, Hole)]
        left = sum(hole.length for hole in holes) + 1  # tokens of the remaining holes, and the end token
        for part in parts:
            if isinstance(part, Part):
                least = -(-len(part.text) // model.characters_per_token)
                check_template_length(template, len(start) + least + left, options, longest)
                start += vocabulary.encoded(part.text)
            else:
                places.append(len(start))
                start += [vocabulary.mask_id] * part.length
                left -= part.length
            check_template_length(template, len(start) + left, options, longest)
        automata = HoleAutomata(vocabulary, holes)
    except TemplateError as error:
        reject("dlm_template", template, str(error))
    spans = [(place, hole.length, number) for place, hole, number in zip(places, holes, automata.numbers, strict=True)]
    layout = Layout(start=start, holes=spans, automata=automata.plain, ends=vocabulary.ends)
    return TemplateLayout(template, layout, vocabulary, automata)


def check_template_length(template: str, tokens: int, options: Options, longest: int) -> None:
    """`tokens`: lower bound of the template's length including its end token; `longest`: the model's length"""
    if options.canvas.max is not None and tokens > options.canvas.max:
        most = f"the maximum canvas of this server is {options.canvas.max}"
        why = f"it has at least {tokens} tokens with its end, and {most}"
        reject("dlm_template", template, why)
    if tokens > longest:
        reject(
            "dlm_template", template, f"it has at least {tokens} tokens with its end; the model's length is {longest}"
        )
