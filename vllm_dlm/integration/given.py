"""What a request gives of its canvas, as tokens: the front-end has the tokenizer, and refuses what cannot be held."""

from vllm_dlm.automaton import Automaton
from vllm_dlm.given import Layout, Text
from vllm_dlm.integration.prompts import prompt_ids
from vllm_dlm.integration.refusal import refuse
from vllm_dlm.integration.vocabulary import Vocabulary
from vllm_dlm.options import Options
from vllm_dlm.template import Hole, Part, TemplateError, parse

#: layouts of templates that are kept: a request is looked at twice, and clients send one many times
KEPT = 64


class Unbounded(str):
    """A template of a chat that gives no `max_tokens`, which vLLM fills in. It goes no farther than the front-end."""


def unmarked(extra_args: dict) -> dict:
    return {name: str(value) if isinstance(value, Unbounded) else value for name, value in extra_args.items()}


def layout_of(options: Options, processor) -> tuple[Layout, list[int]]:
    """How the canvas is laid out, and the tokens behind it."""
    if options.given.template:
        return template_layout(options.given.template, processor), []
    given = options.given
    suffix = tokens_of("dlm_suffix", given.suffix, processor, options.infill)
    draft = tokens_of("dlm_draft", given.draft, processor, options.infill)
    remask = (0.5 if given.remask is None else given.remask) if draft else 0.0
    return Layout(suffix=len(suffix), start=draft, remask=remask), suffix


def tokens_of(field: str, given: Text, processor, infill: bool | None = None) -> list[int]:
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
    return prompt_ids(processor.get_tokenizer().encode(given, add_special_tokens=False), True, infill, processor)


def template_layout(template: str, processor) -> Layout:
    """Texts become tokens one by one, so none goes across the edge of a hole."""
    kept: dict[str, Layout] = processor.__dict__.setdefault("dlm_templates", {})
    if (found := kept.get(template)) is not None:
        return found
    if processor.tokenizer is None:
        refuse("dlm_template", template, "this engine has no tokenizer")
    vocabulary, start, holes = Vocabulary.of(processor), list[int](), list[tuple[int, int, int]]()
    automata: dict[Hole, tuple[int, Automaton]] = {}
    try:
        for part in parse(template, processor.model_config.max_model_len):
            if isinstance(part, Part):
                tokens = vocabulary.encoded(part.text)
            else:
                tokens = [vocabulary.mask_id] * part.length
                of, _ = automata.setdefault(part, (len(automata), vocabulary.automaton(part)))
                holes.append((len(start), part.length, of))
            start += tokens
    except TemplateError as error:
        refuse("dlm_template", template, str(error))
    plain = [automaton.plain() for _, automaton in automata.values()]
    layout = Layout(start=start, holes=holes, automata=plain, ends=vocabulary.ends)
    while len(kept) >= KEPT:
        del kept[next(iter(kept))]
    kept[template] = layout
    return layout


def refuse_template(params, options: Options, layout: Layout, prompt: int, processor) -> None:
    """What does not go with a template, or has no room for it."""
    given, longest = options.given, processor.model_config.max_model_len
    if given.suffix:
        why = "a template is all of the canvas and of what comes behind it; write it to the end of the template"
        refuse("dlm_suffix", given.suffix, why)
    if given.draft:
        refuse("dlm_draft", given.draft, "a template says what stands from the start")
    if params.ignore_eos:
        refuse("ignore_eos", True, "with dlm_template an end token ends a hole, and the template the answer")
    bounded = not isinstance((params.extra_args or {}).get("dlm_template"), Unbounded)
    if bounded and params.max_tokens is not None and params.max_tokens < layout.length:
        why = f"the template has {layout.length - 1} tokens and its end is one: give {layout.length}, or none in a chat"
        refuse("max_tokens", params.max_tokens, why)
    if options.canvas.max is not None and layout.length > options.canvas.max:
        why = f"it has {layout.length} tokens with its end, and the longest canvas of this server {options.canvas.max}"
        refuse("dlm_template", given.template, why)
    if prompt + layout.length > longest:
        why = f"it has {layout.length} tokens with its end, the prompt {prompt}, and the model reads {longest}"
        refuse("dlm_template", given.template, why)


def refuse_draft(options: Options, layout: Layout, asked: int, length: int) -> None:
    """`asked`: max_tokens; `length`: of the canvas"""
    if options.extent.grows:
        why = "dlm_extent: a draft is read as a whole, and beyond the window nothing is; ask for full"
        refuse("dlm_draft", options.given.draft, why)
    if len(layout.start) > length:
        refuse("max_tokens", asked, f"the draft has {len(layout.start)} tokens, and the canvas has room for {length}")
